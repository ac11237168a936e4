//! What every program does, step by step.

use serde::{Deserialize, Serialize};

/// One thing that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Step {
    /// The first file into an empty store.
    IngestFirst,
    /// The second: the first after an upgrade.
    IngestChanged,
    /// All others, one after the other.
    IngestOthers,
    /// All again, unchanged.
    IngestAgain,
    /// All out again.
    Extract,
    /// And once more, with what the page cache has from before.
    ExtractAgain,
    /// Blocks of 4 KiB at random, with what it takes to begin and to end.
    Read,
    /// The same blocks once more, with what the page cache has.
    ReadAgain,
    /// Every second file removed, and its space given back.
    Delete,
}

/// Steps that one program takes without a pause, so that the second finds the
/// page cache as the first left it; then it is the next program's turn.
pub(super) const TURNS: [&[Step]; 7] = [
    &[Step::IngestFirst],
    &[Step::IngestChanged],
    &[Step::IngestOthers],
    &[Step::IngestAgain],
    &[Step::Extract, Step::ExtractAgain],
    &[Step::Read, Step::ReadAgain],
    &[Step::Delete],
];

/// All that brings the corpus into a store.
pub(super) const INGEST: [Step; 3] = [Step::IngestFirst, Step::IngestChanged, Step::IngestOthers];

impl Step {
    /// What is going on, for who waits.
    pub(super) fn doing(self) -> &'static str {
        match self {
            Self::IngestFirst => "ingesting the first file",
            Self::IngestChanged => "ingesting a changed version",
            Self::IngestOthers => "ingesting the others",
            Self::IngestAgain => "ingesting all again",
            Self::Extract => "extracting all",
            Self::ExtractAgain => "extracting all again",
            Self::Read => "reading blocks",
            Self::ReadAgain => "reading blocks again",
            Self::Delete => "removing every second file",
        }
    }

    /// Whether the page cache is dropped before it.
    pub(super) fn cold(self) -> bool {
        !matches!(self, Self::ExtractAgain | Self::ReadAgain)
    }
}
