//! The figures as Markdown, as `docs/performance.md` has them.

use super::figures::{CPU, Figure, MEMORY, SET_ASIDE, STORED, WALL};
use super::report::{Outcome, Report};

/// All figures, a column for each program: medians.
pub(super) fn table(report: &Report) -> String {
    let programs = &report.programs;
    let names: Vec<String> = programs.iter().map(|one| one.program.clone()).collect();
    let mut text = row("", &names) + "\n" + &row("---", &vec!["---".to_owned(); names.len()]);
    let mut add = |what: &str, of: &dyn Fn(&Outcome) -> String| {
        let cells: Vec<String> = programs.iter().map(of).collect();
        text.push('\n');
        text.push_str(&row(what, &cells));
    };
    add("compression", &|one| one.compression.clone());
    for (wall, cpu) in WALL.iter().zip(&CPU) {
        let both = |one: &Outcome| match (wall.of(one), cpu.of(one)) {
            (Some(w), Some(c)) => {
                format!("{} / {}", wall.unit.text(w.median), cpu.unit.text(c.median))
            }
            _ => "cannot".to_owned(),
        };
        add(&format!("{}: wall / CPU s", wall.what), &both);
    }
    let groups: [(&str, &[Figure]); 3] =
        [("stored", &STORED), ("beside that", &[SET_ASIDE]), ("largest process", &MEMORY)];
    for (group, figures) in groups {
        for figure in figures {
            add(&format!("{group}, {}: {}", figure.what, figure.unit.name()), &|one| {
                figure
                    .of(one)
                    .map_or_else(|| "cannot".to_owned(), |spread| figure.unit.text(spread.median))
            });
        }
    }
    text
}

fn row(what: &str, cells: &[String]) -> String {
    format!("| {what} | {} |", cells.join(" | "))
}

/// Coppice beside whoever of the others is best at it.
pub(super) fn best_of_others(report: &Report) -> String {
    let mut text =
        String::from("| | Coppice | the best other | ratio |\n| --- | --- | --- | --- |");
    let groups: [(&str, &[Figure]); 4] = [
        ("", &WALL),
        ("CPU time to ", &CPU),
        ("stored, ", &STORED),
        ("largest process, ", &MEMORY),
    ];
    for (group, figures) in groups {
        for figure in figures {
            let Some((own, best, name)) = against(report, figure) else { continue };
            let unit = figure.unit;
            text.push_str(&format!(
                "\n| {group}{} | {} {} | {} {} ({name}) | {:.2} |",
                figure.what,
                unit.text(own),
                unit.name(),
                unit.text(best),
                unit.name(),
                own / best
            ));
        }
    }
    text
}

/// Coppice's median, the least of the others', and whose that is.
fn against<'a>(report: &'a Report, figure: &Figure) -> Option<(f64, f64, &'a str)> {
    let median = |one: &Outcome| figure.of(one).map(|spread| spread.median);
    let own = report.programs.iter().find(|one| one.program == "coppice").and_then(median)?;
    let others = report.programs.iter().filter(|one| !one.own());
    let (best, name) = others
        .filter_map(|one| Some((median(one)?, one.program.as_str())))
        .min_by(|one, other| one.0.total_cmp(&other.0))?;
    Some((own, best, name))
}

/// How many times as fast as the fastest other Coppice takes the corpus in
/// and gives it out.
pub(super) fn speed(report: &Report) -> String {
    let times = |figure: &Figure| {
        against(report, figure)
            .map_or_else(|| "-".to_owned(), |(own, best, _)| format!("{:.1}", best / own))
    };
    format!("{} and {} times as fast as the fastest other", times(&WALL[0]), times(&WALL[3]))
}

/// What Coppice stores of the corpus, and of one file.
pub(super) fn size(report: &Report) -> String {
    let share = |figure: &Figure| {
        against(report, figure)
            .map_or_else(|| "-".to_owned(), |(own, best, _)| format!("{:.2}", own / best))
    };
    format!(
        "{} of the bytes of the smallest other ({} for a single file)",
        share(&STORED[2]),
        share(&STORED[0])
    )
}

/// On what and where it was measured.
pub(super) fn setting(report: &Report) -> String {
    let loads: Vec<&str> =
        report.load_averages.iter().filter_map(|load| load.split(' ').next()).collect();
    let versions: Vec<String> = report.programs.iter().map(version).collect();
    format!(
        "{} files, {}, of it {} of data. {} CPUs, {} MiB of memory, {}; {} rounds, load average {} before each. {}.",
        report.corpus_files,
        gib(report.logical_bytes),
        gib(report.data_bytes),
        report.host.cpus,
        report.host.memory_mib,
        report.host.kernel,
        report.load_averages.len(),
        loads.join(", "),
        versions.join(", ")
    )
}

/// The program with the number of its version.
fn version(one: &Outcome) -> String {
    let number = one.version.split(' ').find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    format!("{} {}", one.program, number.unwrap_or(&one.version))
}

#[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
pub(super) fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::super::measure::Run;
    use super::super::report::Host;
    use super::super::steps::Step;
    use super::*;

    fn report() -> Report {
        let program = |name: &str, wall_seconds, read: bool| {
            let run = Run {
                wall_seconds,
                cpu_seconds: 1.0,
                peak_memory_kib: 2048,
                stored_bytes: 3 << 20,
                set_aside_bytes: 0,
            };
            let steps = super::super::steps::TURNS.concat();
            let steps = steps.into_iter().filter(|step| read || *step != Step::Read);
            Outcome {
                program: name.to_owned(),
                version: format!("{name} 1.2.3 and more"),
                compression: "zstd 3".to_owned(),
                steps: steps.map(|step| (step, vec![run])).collect(),
            }
        };
        Report {
            host: Host { cpus: 2, memory_mib: 100, kernel: "Linux 6".to_owned() },
            corpus_files: 3,
            logical_bytes: 1 << 30,
            data_bytes: 1 << 29,
            blocks_per_file: 1,
            load_averages: vec!["0.50 0.60 1/2 3".to_owned()],
            programs: vec![
                program("coppice", 2.0, true),
                program("coppice@1", 0.5, true),
                program("borg", 5.0, true),
                program("casync", 4.0, false),
            ],
        }
    }

    #[test]
    fn the_best_other_is_no_coppice_and_can_do_it() {
        let text = best_of_others(&report());
        assert!(text.contains("| extract all, cold | 2.00 s | 4.00 s (casync) | 0.50 |"), "{text}");
        assert!(
            text.contains("| read blocks at random, cold | 2.00 s | 5.00 s (borg) |"),
            "{text}"
        );
        assert_eq!(speed(&report()), "2.0 and 2.0 times as fast as the fastest other");
    }

    #[test]
    fn every_row_has_a_cell_for_each_program() {
        let text = table(&report());
        assert!(text.lines().all(|line| line.matches('|').count() == 6), "{text}");
        assert!(text.contains("cannot"));
        assert!(setting(&report()).contains("load average 0.50 before"));
        assert!(setting(&report()).ends_with("casync 1.2.3."));
    }
}
