//! What people see: progress bars, tables, sizes, one-line errors.

use std::io::Write;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::rpc::Progress;

/// How a command answers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

impl Output {
    /// Prints the JSON document, or the text that `text` makes.
    pub(crate) fn print<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, value)?;
            writeln!(out)?;
        } else {
            let text = text();
            if !text.is_empty() {
                writeln!(out, "{}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

/// An error and its causes as one line, without saying anything twice.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().replace('\n', " ");
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
    }
    line
}

/// A progress bar on standard error; nothing if that is no terminal.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
}

impl Bar {
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
        Self { bar }
    }

    /// Shows how far along the work is.
    pub(crate) fn show(&self, step: &Progress) {
        if self.bar.length() != Some(step.total) {
            self.bar.set_style(style(step));
            if step.total > 0 {
                self.bar.set_length(step.total);
            }
        }
        self.bar.set_message(step.what.clone());
        self.bar.set_prefix(step.new_bytes.map_or_else(String::new, |new| dedup(step.done, new)));
        self.bar.set_position(step.done);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn style(step: &Progress) -> ProgressStyle {
    let template = match (step.bytes, step.total > 0) {
        (true, true) => {
            "{msg} [{bar:30}] {bytes} of {total_bytes}, {binary_bytes_per_sec}{prefix}, {eta}"
        }
        (true, false) => "{msg} {bytes}, {binary_bytes_per_sec}{prefix}",
        (false, true) => "{msg} [{bar:30}] {pos} of {len}, {eta}",
        (false, false) => "{msg} {pos}",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// How many bytes went in for each that the store did not have, holes and
/// zeros included.
fn dedup(done: u64, new: u64) -> String {
    match done.saturating_mul(10).checked_div(new) {
        Some(tenths) => format!(", dedup {}.{}x", tenths / 10, tenths % 10),
        None => ", nothing new".to_owned(),
    }
}

/// Bytes for people: `1.5 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// Microseconds for people: `850 us`, `12.3 ms`, `4.5 s`.
pub(crate) fn micros(count: u64) -> String {
    let (whole, unit) = match count {
        0..1_000 => return format!("{count} us"),
        1_000..1_000_000 => (count / 100, "ms"),
        _ => (count / 100_000, "s"),
    };
    format!("{}.{} {unit}", whole / 10, whole % 10)
}

/// Columns as wide as their widest cell; the first row is the heading.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(line.join("   ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_read_well() {
        assert_eq!(micros(850), "850 us");
        assert_eq!(micros(12_345), "12.3 ms");
        assert_eq!(micros(4_560_000), "4.5 s");
        assert_eq!(bytes(3 << 29), "1.50 GiB");
    }

    #[test]
    fn an_error_says_nothing_twice() {
        let error = anyhow::anyhow!("disk full").context("cannot import: disk full");
        assert_eq!(one_line(&error), "cannot import: disk full");
        let error = anyhow::anyhow!("disk full").context("cannot import x");
        assert_eq!(one_line(&error), "cannot import x: disk full");
    }

    #[test]
    fn dedup_is_told_as_a_ratio() {
        assert_eq!(dedup(5 << 30, 2 << 30), ", dedup 2.5x");
        assert_eq!(dedup(1 << 20, 1 << 20), ", dedup 1.0x");
        assert_eq!(dedup(1 << 20, 0), ", nothing new");
    }

    #[test]
    fn columns_line_up() {
        let rows =
            vec![vec!["NAME".to_owned(), "SIZE".to_owned()], vec!["a".to_owned(), "1".to_owned()]];
        assert_eq!(table(&rows), "NAME   SIZE\na      1\n");
    }
}
