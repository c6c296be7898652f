//! Reads `key=number` words from the arguments and prints them as JSON.

use std::collections::BTreeMap;

#[derive(serde::Serialize, serde::Deserialize)]
struct Words {
    greeting: String,
    numbers: BTreeMap<String, u64>,
}

fn main() {
    let word = regex::Regex::new(r"^(\w+)=(\d+)$").expect("a valid expression");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let numbers = arguments
        .iter()
        .filter_map(|argument| word.captures(argument))
        .map(|found| (found[1].to_owned(), found[2].parse().expect("digits")))
        .collect();
    let text = serde_json::to_string(&Words { greeting: "hello".into(), numbers }).expect("plain data");
    let read: Words = serde_json::from_str(&text).expect("what was just written");
    println!("{} {text}", read.greeting);
}
