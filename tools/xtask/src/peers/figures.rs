//! Which figures are told, in which order: the table, the plots and the
//! comparison with the best of the others all read from here.

use super::report::{Outcome, Spread};
use super::steps::Step;

/// One figure of a program; less is better.
#[derive(Debug, Clone, Copy)]
pub(super) struct Figure {
    pub(super) what: &'static str,
    pub(super) unit: Unit,
    pub(super) of: fn(&Outcome) -> Option<Spread>,
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

const fn seconds(what: &'static str, of: fn(&Outcome) -> Option<Spread>) -> Figure {
    Figure { what, unit: Unit::Seconds, of }
}

const fn mib(what: &'static str, of: fn(&Outcome) -> Option<Spread>) -> Figure {
    Figure { what, unit: Unit::Mib, of }
}

/// Wall time of what is done with the whole corpus.
pub(super) const WALL: [Figure; 8] = [
    seconds("ingest all files", |one| one.ingest(|run| run.wall_seconds)),
    seconds("ingest a changed version", |one| one.of(Step::IngestChanged, |run| run.wall_seconds)),
    seconds("ingest all again, unchanged", |one| one.of(Step::IngestAgain, |run| run.wall_seconds)),
    seconds("extract all, cold", |one| one.of(Step::Extract, |run| run.wall_seconds)),
    seconds("extract all, repeated", |one| one.of(Step::ExtractAgain, |run| run.wall_seconds)),
    seconds("read blocks at random, cold", |one| one.of(Step::Read, |run| run.wall_seconds)),
    seconds("read blocks at random, repeated", |one| {
        one.of(Step::ReadAgain, |run| run.wall_seconds)
    }),
    seconds("delete half and collect", |one| one.of(Step::Delete, |run| run.wall_seconds)),
];

/// CPU time of the same.
pub(super) const CPU: [Figure; 8] = [
    seconds("ingest all files", |one| one.ingest(|run| run.cpu_seconds)),
    seconds("ingest a changed version", |one| one.of(Step::IngestChanged, |run| run.cpu_seconds)),
    seconds("ingest all again, unchanged", |one| one.of(Step::IngestAgain, |run| run.cpu_seconds)),
    seconds("extract all, cold", |one| one.of(Step::Extract, |run| run.cpu_seconds)),
    seconds("extract all, repeated", |one| one.of(Step::ExtractAgain, |run| run.cpu_seconds)),
    seconds("read blocks at random, cold", |one| one.of(Step::Read, |run| run.cpu_seconds)),
    seconds("read blocks at random, repeated", |one| {
        one.of(Step::ReadAgain, |run| run.cpu_seconds)
    }),
    seconds("delete half and collect", |one| one.of(Step::Delete, |run| run.cpu_seconds)),
];

/// What the store takes on the disk.
pub(super) const STORED: [Figure; 4] = [
    mib("the first file", |one| one.of(Step::IngestFirst, |run| run.stored_mib())),
    mib("and its changed version", |one| one.of(Step::IngestChanged, |run| run.stored_mib())),
    mib("all files", |one| one.of(Step::IngestOthers, |run| run.stored_mib())),
    mib("half of them deleted", |one| one.of(Step::Delete, |run| run.stored_mib())),
];

/// What it takes beside that, and gives back when the disk is full.
pub(super) const SET_ASIDE: Figure = mib("set aside for clearing a full disk", |one| {
    one.of(Step::IngestOthers, |run| run.set_aside_mib())
});

/// The largest process.
pub(super) const MEMORY: [Figure; 4] = [
    mib("ingest", |one| one.of(Step::IngestOthers, |run| run.peak_mib())),
    mib("extract", |one| one.of(Step::Extract, |run| run.peak_mib())),
    mib("read blocks at random", |one| one.of(Step::Read, |run| run.peak_mib())),
    mib("delete and collect", |one| one.of(Step::Delete, |run| run.peak_mib())),
];
