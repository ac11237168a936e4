//! The figures as a table in Markdown, as `docs/performance.md` has it.

use super::measure::Figures;
use super::{Outcome, Report};

type Row = (&'static str, fn(&Outcome) -> String);

const ROWS: [Row; 9] = [
    ("compression", |one| one.compression.clone()),
    ("first file: wall / CPU s", |one| seconds(&one.ingest_first)),
    ("the others: wall / CPU s", |one| seconds(&one.ingest_rest)),
    ("all again: wall / CPU s", |one| seconds(&one.ingest_again)),
    ("extract all: wall / CPU s", |one| seconds(&one.extract)),
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
        let peak = peaks.map(|figures| figures.peak_memory_kib).into_iter().max().unwrap_or(0);
        text.push_str(&format!(" {} |", mib(peak << 10)));
    }
    text
}

fn seconds(figures: &Figures) -> String {
    format!("{:.1} / {:.1}", figures.wall_seconds, figures.cpu_seconds)
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", (bytes + (1 << 19)) >> 20)
}
