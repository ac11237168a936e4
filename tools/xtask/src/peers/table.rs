//! The figures as a table in Markdown, as `docs/performance.md` has it.

use super::measure::Figures;
use super::{Outcome, Report};

type Row = (&'static str, fn(&Outcome) -> String);

const ROWS: [Row; 12] = [
    ("compression", |one| one.compression.clone()),
    ("first file: wall / CPU s", |one| seconds(&one.ingest_first)),
    ("the others: wall / CPU s", |one| seconds(&one.ingest_rest)),
    ("all again: wall / CPU s", |one| seconds(&one.ingest_again)),
    ("extract all: wall / CPU s", |one| seconds(&one.extract)),
    ("extract all again, warm", |one| seconds(&one.extract_again)),
    ("read blocks at random, cold", |one| maybe(one.read.as_ref())),
    ("read them again, warm", |one| maybe(one.read_again.as_ref())),
    ("delete half, collect: wall / CPU s", |one| seconds(&one.delete)),
    ("stored, first file", |one| mib(one.stored_bytes_first)),
    ("stored, all", |one| mib(one.stored_bytes)),
    ("stored, half deleted", |one| mib(one.stored_bytes_after_delete)),
];

pub(super) fn table(report: &Report) -> String {
    let mut text = String::from("| |");
    report.programs.iter().for_each(|one| text.push_str(&format!(" {} |", one.program)));
    text.push_str("\n| --- |");
    report.programs.iter().for_each(|_| text.push_str(" --- |"));
    for (what, of) in ROWS {
        text.push_str(&format!("\n| {what} |"));
        report.programs.iter().for_each(|one| text.push_str(&format!(" {} |", of(one))));
    }
    text.push_str("\n| largest process |");
    for one in &report.programs {
        let peaks = [&one.ingest_first, &one.ingest_rest, &one.ingest_again, &one.extract];
        let peaks = peaks.into_iter().chain([&one.delete]).chain(one.read.as_ref());
        let peak = peaks.map(|figures| figures.peak_memory_kib).max().unwrap_or(0);
        text.push_str(&format!(" {} |", mib(peak << 10)));
    }
    text
}

fn maybe(figures: Option<&Figures>) -> String {
    figures.map_or_else(|| "cannot".to_owned(), seconds)
}

fn seconds(figures: &Figures) -> String {
    format!("{:.1} / {:.1}", figures.wall_seconds, figures.cpu_seconds)
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", (bytes + (1 << 19)) >> 20)
}
