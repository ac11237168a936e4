//! The figures of `bench-peers` as SVG, without a library: rows of horizontal
//! bars, one for each program. Colours follow the reader's preference for
//! light or dark.

use super::figures::{CPU, Figure, MEMORY, STORED, Unit, WALL};
use super::report::{Outcome, Report, Spread};

const WIDTH: f64 = 760.0;
const MARGIN: f64 = 16.0;
/// Where bars begin.
const LEFT: f64 = 96.0;
/// The longest bar; the rest of the width is for its figure.
const BAR: f64 = 560.0;
const ROW: f64 = 18.0;

/// Every plot with the name of its file.
pub(super) fn plots(report: &Report) -> Vec<(&'static str, String)> {
    let plot = |name, title: &str, figures: &[Figure]| (name, plot(title, figures, report));
    vec![
        plot("docs/figures/peers-wall.svg", "Wall time, seconds: shorter is better", &WALL),
        plot(
            "docs/figures/peers-cpu.svg",
            "CPU time of all processes, seconds: shorter is better",
            &CPU,
        ),
        plot(
            "docs/figures/peers-stored.svg",
            "Stored, MiB, all metadata counted: less is better",
            &STORED,
        ),
        plot(
            "docs/figures/peers-memory.svg",
            "Memory of the largest process, MiB: less is better",
            &MEMORY,
        ),
    ]
}

fn plot(title: &str, figures: &[Figure], report: &Report) -> String {
    let mut body = text(MARGIN, 26.0, "title", title) + &text(MARGIN, 45.0, "note", &note(report));
    let mut top = 60.0;
    for figure in figures {
        body.push_str(&text(MARGIN, top + 13.0, "group", figure.what));
        top += 20.0;
        let values: Vec<Option<Spread>> =
            report.programs.iter().map(|one| figure.of(one)).collect();
        let most =
            values.iter().flatten().map(|spread| spread.max).fold(f64::MIN_POSITIVE, f64::max);
        for (program, value) in report.programs.iter().zip(values) {
            body.push_str(&row(top, program, value, most, figure.unit));
            top += ROW;
        }
        top += 12.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {top}\" width=\"{WIDTH}\" height=\"{top}\" role=\"img\" aria-label=\"{title}\">\n{STYLE}<rect class=\"paper\" width=\"{WIDTH}\" height=\"{top}\"/>\n{body}</svg>\n"
    )
}

fn note(report: &Report) -> String {
    let rounds = report.load_averages.len();
    let rounds = match rounds {
        1 => "one round".to_owned(),
        _ => format!("median of {rounds} rounds; the thin line goes from the least to the most"),
    };
    let gib = super::table::gib(report.data_bytes);
    format!("{} files, {gib} of data; {rounds}", report.corpus_files)
}

const STYLE: &str = "<style>
text { font: 12px system-ui, \"DejaVu Sans\", sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; }
.group { font-weight: 600; }
.note { fill: #59636e; }
.paper { fill: #ffffff; }
.bar { fill: #afb8c1; }
.own { fill: #2da44e; }
.spread { stroke: #1f2328; stroke-width: 1; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .note { fill: #9198a1; }
  .paper { fill: #0d1117; }
  .bar { fill: #57606a; }
  .own { fill: #2ea043; }
  .spread { stroke: #e6edf3; }
}
</style>
";

fn text(x: f64, y: f64, class: &str, words: &str) -> String {
    format!("<text class=\"{class}\" x=\"{x:.0}\" y=\"{y:.0}\">{words}</text>\n")
}

fn row(top: f64, program: &Outcome, value: Option<Spread>, most: f64, unit: Unit) -> String {
    let name = text(MARGIN + 8.0, top + 12.0, "name", &program.program);
    let Some(spread) = value else {
        return name + &text(LEFT + 4.0, top + 12.0, "note", "cannot");
    };
    let width = |value: f64| (value / most * BAR).max(1.0);
    let class = if program.own() { "own" } else { "bar" };
    let (y, middle) = (top + 2.0, top + 8.5);
    let (from, to) = (LEFT + width(spread.min), LEFT + width(spread.max));
    format!(
        "{name}<rect class=\"{class}\" x=\"{LEFT:.0}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"13\"/>\n<line class=\"spread\" x1=\"{from:.1}\" y1=\"{middle:.1}\" x2=\"{to:.1}\" y2=\"{middle:.1}\"/>\n{}",
        width(spread.median),
        text(
            to + 6.0,
            top + 12.0,
            "figure",
            &format!("{} {}", unit.text(spread.median), unit.name())
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(name: &str) -> Outcome {
        Outcome {
            program: name.to_owned(),
            version: String::new(),
            compression: String::new(),
            steps: std::collections::BTreeMap::new(),
        }
    }

    #[test]
    fn the_longest_bar_fits_and_what_cannot_be_done_is_said() {
        let spread = |median| Some(Spread { min: 1.0, median, max: 120.0 });
        let longest = row(0.0, &program("coppice@1"), spread(120.0), 120.0, Unit::Seconds);
        assert!(longest.contains("width=\"560.0\"") && longest.contains("120.0 s"), "{longest}");
        assert!(longest.contains("class=\"own\"") && longest.contains("x2=\"656.0\""), "{longest}");
        let other = row(0.0, &program("borg"), spread(60.0), 120.0, Unit::Mib);
        assert!(other.contains("class=\"bar\"") && other.contains("60 MiB"), "{other}");
        assert!(row(0.0, &program("casync"), None, 1.0, Unit::Seconds).contains("cannot"));
    }
}
