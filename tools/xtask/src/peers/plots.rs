//! `cargo xtask plots`: the figures of `bench-peers` as SVG, without a library.
//!
//! Each plot is rows of horizontal bars, one for each program. Colours follow
//! the reader's preference for light or dark.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Outcome, Report};
use crate::checkout::Checkout;

/// Which figures to draw, and where to put them.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What `cargo xtask bench-peers` printed
    file: PathBuf,
    /// Where the plots go [default: docs/figures]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// A group of bars.
struct Group {
    title: &'static str,
    value: fn(&Outcome) -> Option<f64>,
}

const TIMES: [Group; 6] = [
    Group {
        title: "ingest all files",
        value: |one| Some(one.ingest_first.wall_seconds + one.ingest_rest.wall_seconds),
    },
    Group {
        title: "ingest them again, unchanged",
        value: |one| Some(one.ingest_again.wall_seconds),
    },
    Group { title: "extract all, cold", value: |one| Some(one.extract.wall_seconds) },
    Group {
        title: "read 4 KiB blocks at random, cold",
        value: |one| one.read.map(|figures| figures.wall_seconds),
    },
    Group {
        title: "read them again, warm",
        value: |one| one.read_again.map(|figures| figures.wall_seconds),
    },
    Group { title: "delete half and collect", value: |one| Some(one.delete.wall_seconds) },
];

const SIZES: [Group; 3] = [
    Group { title: "the first file", value: |one| Some(mib(one.stored_bytes_first)) },
    Group { title: "all files", value: |one| Some(mib(one.stored_bytes)) },
    Group { title: "half of them deleted", value: |one| Some(mib(one.stored_bytes_after_delete)) },
];

const MEMORY: [Group; 4] = [
    Group { title: "ingest", value: |one| Some(mib(one.ingest_rest.peak_memory_kib << 10)) },
    Group { title: "extract", value: |one| Some(mib(one.extract.peak_memory_kib << 10)) },
    Group {
        title: "read at random",
        value: |one| one.read.map(|figures| mib(figures.peak_memory_kib << 10)),
    },
    Group { title: "delete and collect", value: |one| Some(mib(one.delete.peak_memory_kib << 10)) },
];

const WIDTH: f64 = 760.0;
const LEFT: f64 = 80.0;
/// The longest bar; the rest of the width is for its figure.
const BAR: f64 = 560.0;
const ROW: f64 = 18.0;

/// Draws all plots.
pub(crate) fn run(checkout: &Checkout, options: &Options) -> Result<()> {
    let text = std::fs::read_to_string(&options.file)
        .with_context(|| format!("cannot read {}", options.file.display()))?;
    let report: Report = serde_json::from_str(&text).context("not what `bench-peers` printed")?;
    let folder = options.out.clone().unwrap_or_else(|| checkout.root().join("docs/figures"));
    std::fs::create_dir_all(&folder)?;
    let write = |name: &str, title: &str, unit: &str, groups: &[Group]| -> Result<()> {
        let path: &Path = &folder.join(name);
        std::fs::write(path, plot(title, unit, groups, &report.programs))?;
        eprintln!("xtask: {}", path.display());
        Ok(())
    };
    write("peers-time.svg", "Wall time, shorter is better", "s", &TIMES)?;
    write("peers-size.svg", "Stored, less is better", "MiB", &SIZES)?;
    write("peers-memory.svg", "Largest process, less is better", "MiB", &MEMORY)
}

#[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn plot(title: &str, unit: &str, groups: &[Group], programs: &[Outcome]) -> String {
    let mut body = text(8.0, 22.0, "title", title);
    let mut top = 40.0;
    for group in groups {
        body.push_str(&text(8.0, top + 13.0, "group", group.title));
        top += 20.0;
        let values: Vec<Option<f64>> = programs.iter().map(group.value).collect();
        let most = values.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
        for (program, value) in programs.iter().zip(values) {
            body.push_str(&row(top, &program.program, value.map(|v| (v, v / most)), unit));
            top += ROW;
        }
        top += 10.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {top}\" width=\"{WIDTH}\" height=\"{top}\" role=\"img\" aria-label=\"{title}\">\n{STYLE}<rect class=\"paper\" width=\"{WIDTH}\" height=\"{top}\"/>\n{body}</svg>\n"
    )
}

const STYLE: &str = "<style>
text { font: 12px system-ui, sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; }
.group { font-weight: 600; }
.paper { fill: #ffffff; }
.bar { fill: #8c959f; }
.own { fill: #1a7f37; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .paper { fill: #0d1117; }
  .bar { fill: #6e7681; }
  .own { fill: #3fb950; }
}
</style>
";

fn text(x: f64, y: f64, class: &str, words: &str) -> String {
    format!("<text class=\"{class}\" x=\"{x:.0}\" y=\"{y:.0}\">{words}</text>\n")
}

fn row(top: f64, program: &str, value: Option<(f64, f64)>, unit: &str) -> String {
    let name = text(16.0, top + 12.0, "name", program);
    let Some((value, share)) = value else {
        return name + &text(LEFT + 4.0, top + 12.0, "figure", "cannot");
    };
    let width = (share * BAR).max(1.0);
    let class = if program == "coppice" { "own" } else { "bar" };
    let digits = if value < 10.0 { 1 } else { 0 };
    format!(
        "{name}<rect class=\"{class}\" x=\"{LEFT:.0}\" y=\"{:.0}\" width=\"{width:.1}\" height=\"13\"/>\n{}",
        top + 2.0,
        text(LEFT + width + 6.0, top + 12.0, "figure", &format!("{value:.digits$} {unit}"))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_fits_and_what_cannot_be_done_is_said() {
        let longest = row(0.0, "coppice", Some((123.4, 1.0)), "s");
        assert!(longest.contains("width=\"560.0\"") && longest.contains("123 s"), "{longest}");
        assert!(longest.contains("class=\"own\""));
        assert!(row(0.0, "casync", None, "s").contains("cannot"));
        assert!(row(0.0, "x", Some((1.25, 0.1)), "s").contains("1.2 s"));
    }
}
