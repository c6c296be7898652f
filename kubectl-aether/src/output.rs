//! How things are printed: objects, tables, sizes, ages, questions and progress.

use std::cell::RefCell;
use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Resource, ResourceExt};
use serde::Serialize;

use crate::cli::{Format, ObjectFormat};

/// Tells a person at a terminal what is waited for; silent otherwise. Goes to stderr.
pub(crate) struct Progress {
    last: Option<RefCell<String>>,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Self {
        Self { last: (!quiet && std::io::stderr().is_terminal()).then(RefCell::default) }
    }

    pub(crate) fn silent() -> Self {
        Self { last: None }
    }

    /// Says it once, until something else is to be said.
    pub(crate) fn say(&self, text: &str) {
        let Some(last) = &self.last else { return };
        if *last.borrow() != text {
            eprintln!("{text}");
            text.clone_into(&mut last.borrow_mut());
        }
    }
}

/// Writes to stdout. A reader that has gone away (`| head`) ends the program as it ends any other.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(141),
        other => other.context("cannot write to stdout"),
    }
}

/// Prints one object.
pub(crate) fn object<K>(object: &K, format: ObjectFormat) -> Result<()>
where
    K: Resource + Serialize,
    K::DynamicType: Default,
{
    print(&match format {
        ObjectFormat::Json => serde_json::to_string_pretty(object)? + "\n",
        ObjectFormat::Yaml => serde_yaml::to_string(object)?,
        ObjectFormat::Name => reference(object) + "\n",
    })
}

/// Prints several objects: one as it is, more as a List.
pub(crate) fn objects<K>(items: &[K], format: ObjectFormat) -> Result<()>
where
    K: Resource + Serialize,
    K::DynamicType: Default,
{
    if format == ObjectFormat::Name {
        return print(&items.iter().map(|item| reference(item) + "\n").collect::<String>());
    }
    let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": items});
    print(&match format {
        ObjectFormat::Yaml => serde_yaml::to_string(&list)?,
        _ => serde_json::to_string_pretty(&list)? + "\n",
    })
}

impl Format {
    /// The format of whole objects, if it is one.
    pub(crate) fn of_objects(self) -> Option<ObjectFormat> {
        match self {
            Self::Json => Some(ObjectFormat::Json),
            Self::Yaml => Some(ObjectFormat::Yaml),
            Self::Name => Some(ObjectFormat::Name),
            Self::Wide => None,
        }
    }
}

/// `kind.group/name`, as kubectl's `-o name` has it.
fn reference<K>(object: &K) -> String
where
    K: Resource,
    K::DynamicType: Default,
{
    let kind = K::kind(&Default::default()).to_lowercase();
    format!("{kind}.{}/{}", K::group(&Default::default()), object.name_any())
}

/// Columns two spaces apart, as wide as their widest cell; empty when there are no rows. Columns without any value are left out.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let used: Vec<usize> = (0..header.len())
        .filter(|&column| column == 0 || rows.iter().any(|row| !matches!(row[column].as_str(), "" | "-")))
        .collect();
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).chain([header[column].len()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = used.iter().map(|&column| width(column)).collect();
    let line = |cell: &dyn Fn(usize) -> String| {
        let cells = used.iter().zip(&widths).map(|(&column, &width)| format!("{:width$}", cell(column)));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&|column| header[column].to_owned());
    for row in rows {
        text += &line(&|column| row[column].clone());
    }
    text
}

/// A number of bytes: `812B`, `1.2Mi`.
pub(crate) fn bytes(count: i64) -> String {
    const UNITS: [&str; 5] = ["Ki", "Mi", "Gi", "Ti", "Pi"];
    if count.abs() < 1024 {
        return format!("{count}B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value.abs() >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.abs() < 9.95 { format!("{value:.1}{}", UNITS[unit]) } else { format!("{value:.0}{}", UNITS[unit]) }
}

/// A length of time in its two greatest units: `45s`, `3m12s`, `2d4h`.
pub(crate) fn span(length: Duration) -> String {
    let seconds = length.as_secs();
    if seconds == 0 && length.subsec_millis() > 0 {
        return format!("{}ms", length.subsec_millis());
    }
    let parts = [(seconds / 86_400, "d"), (seconds / 3600 % 24, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let first = parts.iter().position(|(count, _)| *count > 0).unwrap_or(3);
    parts[first..]
        .iter()
        .take(2)
        .filter(|(count, _)| *count > 0)
        .map(|(count, unit)| format!("{count}{unit}"))
        .collect::<String>()
        + if seconds == 0 { "0s" } else { "" }
}

/// How long ago that was; `-` when unknown.
pub(crate) fn age(time: Option<&Time>) -> String {
    time.map_or_else(
        || "-".into(),
        |time| span(Duration::from_secs(jiff::Timestamp::now().duration_since(time.0).as_secs().max(0).unsigned_abs())),
    )
}

/// For how long pods stood still.
pub(crate) fn frozen(microseconds: i64) -> String {
    format!("{:.1} ms", microseconds as f64 / 1000.0)
}

/// The text without characters that would command the terminal: others than the reader have written it.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// The first line of a text, for a table.
pub(crate) fn first_line(text: &str) -> String {
    printable(text.lines().next().unwrap_or_default())
}

/// A value or `-`.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// Asks on a terminal; away from one, the answer is yes. No is an error, so that nothing after it happens.
pub(crate) fn confirm(question: &str) -> Result<()> {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(());
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).context("cannot read the answer")?;
    match answer.trim().to_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => bail!("nothing was done"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans() {
        for (count, text) in
            [(0, "0B"), (1023, "1023B"), (1024, "1.0Ki"), (12_345, "12Ki"), (1_048_575, "1.0Mi"), (1 << 40, "1.0Ti")]
        {
            assert_eq!(bytes(count), text);
        }
        for (seconds, text) in [(0, "0s"), (45, "45s"), (192, "3m12s"), (3600, "1h"), (187_200, "2d4h")] {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
        assert_eq!(span(Duration::from_millis(250)), "250ms");
    }

    #[test]
    fn tables_leave_out_what_nobody_has() {
        let rows = vec![vec!["a".into(), "-".into(), "1".into()], vec!["long".into(), String::new(), "22".into()]];
        assert_eq!(table(&["NAME", "NODE", "N"], &rows), "NAME  N\na     1\nlong  22\n");
        assert_eq!(table(&["NAME"], &[]), "");
    }
}
