//! Which figures are told, in which order: the table, the plots and the
//! comparison with the best of the others all read from here.

use super::measure::Run;
use super::report::{Outcome, Spread};
use super::steps::{INGEST, Step};

/// One figure of a program; less is better.
#[derive(Debug, Clone, Copy)]
pub(super) struct Figure {
    pub(super) what: &'static str,
    pub(super) unit: Unit,
    /// What is summed in each round.
    steps: &'static [Step],
    value: fn(&Run) -> f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Seconds,
    Mib,
}

impl Unit {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Mib => "MiB",
        }
    }

    /// A value with as many digits as it is worth.
    pub(super) fn text(self, value: f64) -> String {
        match self {
            Self::Seconds if value < 10.0 => format!("{value:.2}"),
            Self::Seconds => format!("{value:.1}"),
            Self::Mib => format!("{value:.0}"),
        }
    }
}

impl Figure {
    /// What a program needs; none if it cannot do that.
    pub(super) fn of(&self, program: &Outcome) -> Option<Spread> {
        program.over(self.steps, self.value)
    }
}

const fn seconds(what: &'static str, steps: &'static [Step], value: fn(&Run) -> f64) -> Figure {
    Figure { what, unit: Unit::Seconds, steps, value }
}

const fn mib(what: &'static str, steps: &'static [Step], value: fn(&Run) -> f64) -> Figure {
    Figure { what, unit: Unit::Mib, steps, value }
}

/// A time of each thing that is done with the whole corpus.
const fn times(value: fn(&Run) -> f64) -> [Figure; 8] {
    [
        seconds("ingest all files", &INGEST, value),
        seconds("ingest a changed version", &[Step::IngestChanged], value),
        seconds("ingest all again, unchanged", &[Step::IngestAgain], value),
        seconds("extract all, cold", &[Step::Extract], value),
        seconds("extract all, repeated", &[Step::ExtractAgain], value),
        seconds("read blocks at random, cold", &[Step::Read], value),
        seconds("read blocks at random, repeated", &[Step::ReadAgain], value),
        seconds("delete half and collect", &[Step::Delete], value),
    ]
}

/// Wall times.
pub(super) const WALL: [Figure; 8] = times(|run| run.wall_seconds);

/// CPU times of the same.
pub(super) const CPU: [Figure; 8] = times(|run| run.cpu_seconds);

/// What the store takes on the disk.
pub(super) const STORED: [Figure; 4] = [
    mib("the first file", &[Step::IngestFirst], Run::stored_mib),
    mib("and its changed version", &[Step::IngestChanged], Run::stored_mib),
    mib("all files", &[Step::IngestOthers], Run::stored_mib),
    mib("half of them deleted", &[Step::Delete], Run::stored_mib),
];

/// What it takes beside that, and gives back when the disk is full.
pub(super) const SET_ASIDE: Figure =
    mib("set aside for clearing a full disk", &[Step::IngestOthers], Run::set_aside_mib);

/// The largest process.
pub(super) const MEMORY: [Figure; 4] = [
    mib("ingest", &[Step::IngestOthers], Run::peak_mib),
    mib("extract", &[Step::Extract], Run::peak_mib),
    mib("read blocks at random", &[Step::Read], Run::peak_mib),
    mib("delete and collect", &[Step::Delete], Run::peak_mib),
];
