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
    /// Of the rewritten bytes, those of such pages.
    pub gathered_bytes: u64,
    /// Stored bytes that are kept twice from now on: copies, in older packs,
    /// of what was gathered or repacked.
    pub kept_twice_bytes: u64,
    /// Why repacking ended early: the disk is full. What was dropped stays
    /// dropped.
    pub incomplete: Option<String>,
}

impl GcReport {
    /// What this and another collection right behind it did.
    pub(crate) fn and(self, next: Self) -> Self {
        Self {
            freed_bytes: self.freed_bytes + next.freed_bytes,
            dropped_packs: self.dropped_packs + next.dropped_packs,
            repacked_packs: self.repacked_packs + next.repacked_packs,
            read_bytes: self.read_bytes + next.read_bytes,
            rewritten_bytes: self.rewritten_bytes + next.rewritten_bytes,
            gathered_bytes: self.gathered_bytes + next.gathered_bytes,
            nodes_read: self.nodes_read + next.nodes_read,
            counted_anew: self.counted_anew || next.counted_anew,
            straightened_images: self.straightened_images + next.straightened_images,
            ..next
        }
    }
}
