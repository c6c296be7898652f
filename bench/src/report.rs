//! What was measured: rows, the table for a person, `report.json` for a program, and the tables of `docs/benchmarks.md`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::subject::is_ours;

/// The row against which `aether` is held for data and metadata work.
pub(crate) const YARDSTICK: &str = "overlay-by-hand";

/// One subject in one case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) subject: String,
    /// `ms` or `bytes`.
    pub(crate) unit: String,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// How many measurements, without the warm-up.
    pub(crate) n: usize,
}

/// Why a subject has no row in a case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Missing {
    pub(crate) case: String,
    pub(crate) subject: String,
    pub(crate) reason: String,
}

/// Where it was measured.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) processors: usize,
    pub(crate) memory_bytes: u64,
    /// The cargo profile of this program and so of the engine in it.
    pub(crate) profile: String,
    pub(crate) date: String,
    /// Runnable processes in the minute before the run: a busy machine is no place to measure.
    pub(crate) load_before: f64,
    pub(crate) tree_files: u64,
    pub(crate) tree_bytes: u64,
    pub(crate) versions: BTreeMap<String, String>,
    /// Subjects without a row in a case.
    pub(crate) missing: Vec<Missing>,
}

/// All of it, as in `report.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) rows: Vec<Row>,
    pub(crate) machine: Machine,
    /// Why the run ended before its end.
    #[serde(rename = "brokenOff")]
    pub(crate) broken_off: Option<String>,
}

/// Measurements while they are made.
#[derive(Debug, Default)]
pub(crate) struct Measurements {
    values: BTreeMap<(usize, usize), Series>,
    /// In the order in which they are shown.
    cases: Vec<&'static str>,
    subjects: Vec<&'static str>,
}

#[derive(Debug, Default)]
struct Series {
    unit: &'static str,
    warm_up: Option<f64>,
    values: Vec<f64>,
    spent: f64,
    reason: Option<String>,
}

impl Measurements {
    pub(crate) fn new(cases: &[&'static str], subjects: &[&'static str]) -> Self {
        Self { cases: cases.to_vec(), subjects: subjects.to_vec(), ..Self::default() }
    }

    fn series(&mut self, case: &str, subject: &str) -> &mut Series {
        let at = |all: &[&str], name: &str| all.iter().position(|item| *item == name).expect("a known name");
        let key = (at(&self.cases, case), at(&self.subjects, subject));
        self.values.entry(key).or_default()
    }

    /// Adds one value. The first of each series is the warm-up and does not count, unless it is the only one.
    pub(crate) fn add(&mut self, case: &str, subject: &str, unit: &'static str, value: f64) {
        let series = self.series(case, subject);
        series.unit = unit;
        if unit == "ms" {
            series.spent += value;
        }
        match series.warm_up {
            None => series.warm_up = Some(value),
            Some(_) => series.values.push(value),
        }
    }

    /// Milliseconds spent in the measured part of a series.
    pub(crate) fn spent(&mut self, case: &str, subject: &str) -> f64 {
        self.series(case, subject).spent
    }

    pub(crate) fn has_reason(&mut self, case: &str, subject: &str) -> bool {
        self.series(case, subject).reason.is_some()
    }

    /// Says why there is no row. The first reason stays.
    pub(crate) fn missing(&mut self, case: &str, subject: &str, reason: impl Into<String>) {
        self.series(case, subject).reason.get_or_insert(reason.into());
    }

    pub(crate) fn finish(self) -> (Vec<Row>, Vec<Missing>) {
        let (mut rows, mut missing) = (Vec::new(), Vec::new());
        for ((case, subject), series) in self.values {
            let (case, subject) = (self.cases[case].to_owned(), self.subjects[subject].to_owned());
            let mut values =
                if series.values.is_empty() { series.warm_up.into_iter().collect() } else { series.values };
            values.sort_by(f64::total_cmp);
            match (values.first(), values.last()) {
                (Some(min), Some(max)) if series.reason.is_none() => rows.push(Row {
                    case,
                    subject,
                    unit: series.unit.to_owned(),
                    median: median(&values),
                    min: *min,
                    max: *max,
                    n: values.len(),
                }),
                _ => missing.push(Missing { case, subject, reason: series.reason.unwrap_or_default() }),
            }
        }
        (rows, missing)
    }
}

/// The middle of sorted values.
pub(crate) fn median(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[half] } else { (sorted[half - 1] + sorted[half]) / 2.0 }
}

impl Report {
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        write_json(path, self)
    }

    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("read {}; `make bench` writes it", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))
    }

    fn cases(&self) -> Vec<&str> {
        let mut cases: Vec<&str> = Vec::new();
        let named = self.rows.iter().map(|row| &row.case).chain(self.machine.missing.iter().map(|item| &item.case));
        for case in named {
            if !cases.contains(&case.as_str()) {
                cases.push(case);
            }
        }
        cases
    }

    fn row(&self, case: &str, subject: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.case == case && row.subject == subject)
    }

    /// One Markdown table: a line for each case and subject, with its ratio to `aether` in the same run.
    pub(crate) fn table(&self) -> String {
        let mut out =
            String::from("| case | subject | median | min | max | n | times aether |\n|---|---|--:|--:|--:|--:|--:|\n");
        for case in self.cases() {
            let ours = self.row(case, "aether");
            for row in self.rows.iter().filter(|row| row.case == case) {
                let ratio = ours
                    .filter(|ours| ours.median > 0.0)
                    .map_or_else(|| "-".into(), |ours| ratio(row.median / ours.median));
                let [median, min, max] = [row.median, row.min, row.max].map(|value| show(value, &row.unit));
                out += &format!("| {case} | {} | {median} | {min} | {max} | {} | {ratio} |\n", row.subject, row.n);
            }
        }
        out
    }

    /// The aims, each with what came out.
    pub(crate) fn aims(&self) -> String {
        let mut out = String::from("| aim | case | aether | beside it | ratio | |\n|---|---|--:|--:|--:|---|\n");
        let mut line = |aim: &str, case: &str, ours: &Row, other: &Row, limit: f64| {
            let value = match other.median {
                zero if zero <= 0.0 && ours.median <= 0.0 => 1.0,
                // Infinite beside nothing at all.
                some => ours.median / some.max(0.0),
            };
            let [a, b] = [ours, other].map(|row| show(row.median, &row.unit));
            let verdict = if value <= limit { "met" } else { "**not met**" };
            out += &format!("| {aim} | {case} | {a} | {b} ({}) | {} | {verdict} |\n", other.subject, ratio(value));
        };
        for case in self.cases() {
            let Some(ours) = self.row(case, "aether") else { continue };
            if case == "create" || case.starts_with("fork-live") {
                if let Some(bare) = self.row(case, "bare-calls") {
                    line("under 1.5 times the bare calls", case, ours, bare, 1.5);
                }
            } else if crate::cases::is_work(case)
                && let Some(overlay) = self.row(case, YARDSTICK)
            {
                line("within 1.1 times of overlay by hand", case, ours, overlay, 1.1);
            }
            if case == "git-status-first"
                && let Some(warm) = self.row("git-status-warm", "aether")
            {
                line("first status within 1.5 times of warm", case, ours, warm, 1.5);
            }
            let others = self.rows.iter().filter(|row| row.case == case && !is_ours(&row.subject));
            if let Some(best) = others.min_by(|a, b| a.median.total_cmp(&b.median)) {
                line("ahead of every other subject", case, ours, best, 1.0);
            }
        }
        out
    }

    /// Why rows are missing.
    pub(crate) fn reasons(&self) -> String {
        if self.machine.missing.is_empty() {
            return String::new();
        }
        // One reason often holds for many cases of one subject.
        let mut grouped: Vec<((&str, &str), Vec<&str>)> = Vec::new();
        for item in &self.machine.missing {
            let key = (item.subject.as_str(), item.reason.as_str());
            match grouped.iter_mut().find(|(known, _)| *known == key) {
                Some((_, cases)) => cases.push(&item.case),
                None => grouped.push((key, vec![&item.case])),
            }
        }
        let mut out = String::from("| subject | no row for | because |\n|---|---|---|\n");
        for ((subject, reason), cases) in grouped {
            out += &format!("| {subject} | {} | {reason} |\n", cases.join(", "));
        }
        out
    }

    /// Everything for `docs/benchmarks.md`.
    pub(crate) fn markdown(&self) -> String {
        let machine = &self.machine;
        let versions: Vec<_> = machine.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        let broken_off = self.broken_off.as_ref().map(|why| format!("**The run broke off**: {why}\n\n"));
        format!(
            "{}Measured {} on Linux {}, {} processors, {} of memory, profile `{}`, load before the run {:.1}; tree of {} files, {}; {}.\n\n### Aims\n\n{}\n### All rows\n\n{}\n### No row\n\n{}",
            broken_off.unwrap_or_default(),
            machine.date,
            machine.kernel,
            machine.processors,
            show(machine.memory_bytes as f64, "bytes"),
            machine.profile,
            machine.load_before,
            machine.tree_files,
            show(machine.tree_bytes as f64, "bytes"),
            versions.join(", "),
            self.aims(),
            self.table(),
            self.reasons(),
        )
    }
}

/// Writes pretty JSON, making the directory.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let directory = path.parent().context("a path in a directory")?;
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// Replaces what is between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in a document.
pub(crate) fn replace_between(document: &str, name: &str, text: &str) -> Result<String> {
    let [begin, end] = ["begin", "end"].map(|which| format!("<!-- {name}:{which} -->"));
    let from = document.find(&begin).with_context(|| format!("the document has no {begin}"))? + begin.len();
    let to = document.find(&end).with_context(|| format!("the document has no {end}"))?;
    ensure!(from <= to, "{begin} comes after {end}");
    Ok(format!("{}\n{}\n{}", &document[..from], text.trim_end(), &document[to..]))
}

fn ratio(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

/// A value with its unit, as a person reads it.
pub(crate) fn show(value: f64, unit: &str) -> String {
    let scaled = |value: f64, unit: &str| {
        let digits = if value.abs() >= 100.0 {
            0
        } else if value.abs() >= 10.0 {
            1
        } else {
            2
        };
        format!("{value:.digits$} {unit}")
    };
    match unit {
        "bytes" => match value {
            v if v.abs() >= 1e9 => scaled(v / 1e9, "GB"),
            v if v.abs() >= 1e6 => scaled(v / 1e6, "MB"),
            v if v.abs() >= 1e3 => scaled(v / 1e3, "kB"),
            v => format!("{v:.0} B"),
        },
        "ms" if value >= 10_000.0 => scaled(value / 1000.0, "s"),
        unit => scaled(value, unit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_warm_up_counts_only_alone_and_a_reason_takes_the_row_away() {
        let mut all = Measurements::new(&["create", "untar"], &["aether", "copy"]);
        for value in [100.0, 1.0, 3.0, 2.0] {
            all.add("create", "aether", "ms", value);
        }
        all.add("create", "copy", "ms", 9.0);
        all.add("untar", "copy", "ms", 9.0);
        all.missing("untar", "copy", "it cannot");
        let (rows, missing) = all.finish();
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].median, rows[0].min, rows[0].max, rows[0].n), (2.0, 1.0, 3.0, 3));
        assert_eq!((rows[1].median, rows[1].n), (9.0, 1));
        assert_eq!(missing[0].reason, "it cannot");
    }

    #[test]
    fn whoever_takes_nothing_is_ahead() {
        let row = |subject: &str, median| Row {
            case: "memory-per-copy".into(),
            subject: subject.into(),
            unit: "bytes".into(),
            median,
            min: median,
            max: median,
            n: 1,
        };
        let aims = |ours| {
            let rows = vec![row("aether", ours), row("overlay-by-hand", 900.0), row("copy", 0.0)];
            Report { rows, machine: Machine::default(), broken_off: None }.aims()
        };
        assert!(aims(500.0).contains("| 0 B (copy) | inf | **not met** |"), "{}", aims(500.0));
        assert!(aims(0.0).contains("| 0 B (copy) | 1.00 | met |"), "{}", aims(0.0));
    }

    #[test]
    fn only_what_lies_between_the_markers_is_replaced() {
        let document = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n";
        assert_eq!(replace_between(document, "x", "new\n").unwrap(), "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n");
        assert!(replace_between(document, "y", "new").is_err());
    }

    #[test]
    fn values_read_well() {
        assert_eq!(show(1.234, "ms"), "1.23 ms");
        assert_eq!(show(12_345.0, "ms"), "12.3 s");
        assert_eq!(show(15_300.0, "bytes"), "15.3 kB");
        assert_eq!(median(&[1.0, 2.0, 3.0, 10.0]), 2.5);
    }
}
