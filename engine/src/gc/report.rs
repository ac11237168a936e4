//! What a collection did, and how far it is.

use serde::{Deserialize, Serialize};

/// How far a collection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GcStep {
    /// It looks for images that take too many frames, and gathers their pages.
    Straighten,
    /// It counts what came and went.
    Count,
    /// It removes and rewrites packs: so many bytes of so many are done.
    Collect {
        /// Bytes of packs done.
        done: u64,
        /// Bytes of all packs that go.
        total: u64,
    },
}

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    /// Bytes of files that are gone, less those of new packs.
    pub freed_bytes: u64,
    /// Packs that were dead whole and are gone.
    pub dropped_packs: u64,
    /// Packs whose living objects moved and that are gone.
    pub repacked_packs: u64,
    /// Bytes read to rewrite them.
    pub read_bytes: u64,
    /// Bytes of the new packs.
    pub rewritten_bytes: u64,
    /// Tree nodes read to know what lives: those that came and went since the
    /// last collection.
    pub nodes_read: u64,
    /// Whether everything was counted, because nothing was known.
    pub counted_anew: bool,
    /// Packs left alone because open sessions rely on them.
    pub busy_packs: u64,
    /// Packs left alone because something needed in them is damaged.
    pub damaged_packs: u64,
    /// Images whose pages were gathered into fewer frames.
    pub straightened_images: u64,
    /// Why repacking ended early: the disk is full. What was dropped stays
    /// dropped.
    pub incomplete: Option<String>,
}
