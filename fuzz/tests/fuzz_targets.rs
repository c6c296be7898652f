//! All targets for a short while, on inputs made of seeds: changed, cut, joined. `FUZZ_INPUT=file` runs one input,
//! `FUZZ_SEEDS=folder` writes the seeds.

use std::{
    panic::catch_unwind,
    path::Path,
    time::{Duration, Instant},
};

use aether_cas::Blob;
use aether_fuzz::{TARGETS, Target};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// For each target.
const TIME: Duration = Duration::from_secs(2);
/// So that inputs that are not taken at once are looked at all the same.
const LONGEST: usize = 64 << 10;

#[test]
fn decoders_keep_their_promises() {
    if let Ok(path) = std::env::var("FUZZ_INPUT") {
        let name = Path::new(&path).file_name().unwrap().to_str().unwrap();
        let target = TARGETS.iter().find(|t| name.starts_with(t.name)).expect("the file is named after its target");
        return target.run(&std::fs::read(&path).unwrap());
    }
    if let Ok(folder) = std::env::var("FUZZ_SEEDS") {
        return TARGETS.iter().for_each(|target| write_seeds(target, &Path::new(&folder).join(target.name)));
    }
    for (number, target) in TARGETS.iter().enumerate() {
        let mut random = StdRng::seed_from_u64(number as u64);
        let mut inputs = (target.seeds)();
        inputs.iter().for_each(|seed| run(target, seed));
        let seeds = inputs.len();
        let (mut executions, begin) = (seeds as u64, Instant::now());
        while begin.elapsed() < TIME {
            let mut input = inputs[random.random_range(0..inputs.len())].clone();
            for _ in 0..random.random_range(1..4) {
                change(&mut input, &inputs, &mut random);
            }
            run(target, &input);
            executions += 1;
            // A few inputs far from the seeds, so that others come of them.
            if executions.is_multiple_of(1000) && inputs.len() < 10 * seeds {
                inputs.push(input);
            }
        }
        println!("{}: {executions} executions from {seeds} seeds", target.name);
    }
}

/// For libFuzzer to begin with.
fn write_seeds(target: &Target, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    for (number, seed) in (target.seeds)().iter().enumerate() {
        std::fs::write(folder.join(number.to_string()), seed).unwrap();
    }
}

fn run(target: &Target, input: &[u8]) {
    if let Err(panic) = catch_unwind(|| target.run(input)) {
        let folder = Path::new(env!("AETHER_TOP")).join("target/fuzz");
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("{}-{}", target.name, &Blob::of(input).digest.to_string()[..16]));
        std::fs::write(&path, input).unwrap();
        eprintln!("the input is kept: FUZZ_INPUT={} cargo test --test fuzz_targets", path.display());
        std::panic::resume_unwind(panic);
    }
}

fn change(input: &mut Vec<u8>, others: &[Vec<u8>], random: &mut StdRng) {
    let at = random.random_range(0..=input.len());
    let length = random.random_range(0..16).min(input.len() - at);
    match random.random_range(0..7) {
        0 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
        1 if at < input.len() => input[at] = random.random(),
        2 => input.truncate(at),
        3 => input.insert(at, random.random()),
        4 => drop(input.drain(at..at + length)),
        5 => {
            let copy = input[at..at + length].to_vec();
            input.splice(at..at, copy);
        }
        _ => {
            let other = &others[random.random_range(0..others.len())];
            let from = random.random_range(0..=other.len());
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
    }
    input.truncate(LONGEST);
}
