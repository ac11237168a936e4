//! The plan: what a collection would do to each pack, as a plain value.

use serde::{Deserialize, Serialize};

use crate::depot::Depot;
use crate::id::{PackId, Root};
use crate::ledger::{Ledger, PackRow};

/// How much to collect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GcOptions {
    /// A pack is repacked when at least this share of its frames' bytes is
    /// dead, in percent; a pack that is dead whole is dropped in any case.
    pub dead_percent_min: u8,
    /// An image that takes more frames than this share of what a fresh one
    /// takes, in percent, is straightened; at least 100.
    pub frames_percent_max: u32,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self { dead_percent_min: 25, frames_percent_max: 150 }
    }
}

/// What becomes of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GcAction {
    /// It stays as it is.
    Keep,
    /// What lives in it moves to a new pack.
    Repack,
    /// Nothing lives in it.
    Drop,
    /// An open session relies on it; another run may collect it.
    Busy,
}

/// A pack and what becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcPack {
    /// Which pack.
    pub pack: PackId,
    /// What becomes of it.
    pub action: GcAction,
    /// Length of its file.
    pub file_bytes: u64,
    /// Objects that somebody needs.
    pub live_objects: u64,
    /// Objects that nobody needs, or that a younger pack has too.
    pub dead_objects: u64,
    /// Plaintext of chunks that somebody needs.
    pub live_chunk_bytes: u64,
    /// Plaintext of other chunks.
    pub dead_chunk_bytes: u64,
    /// Bytes of frames, each split by plaintext among its objects: the living.
    pub live_stored_bytes: u64,
    /// Bytes of frames, each split by plaintext among its objects: the dead.
    pub dead_stored_bytes: u64,
}

/// An image whose pages lie in too many frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcFragmented {
    /// Which image.
    pub root: Root,
    /// Frames that hold its pages.
    pub frames: u64,
    /// Frames that would hold them if it were written anew.
    pub frames_when_fresh: u64,
    /// Pages of it that are written once more; some may be others' too.
    pub rewritten_pages: u64,
}

/// What a collection would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcPlan {
    /// Bytes of files that go at once, without any writing.
    pub freed_now_bytes: u64,
    /// Tree nodes read to know what lives: those that came and went since the
    /// last collection.
    pub nodes_read: u64,
    /// Whether everything was counted, because nothing was known.
    pub counted_anew: bool,
    /// About as many bytes are read to write others anew.
    pub read_bytes: u64,
    /// About as many bytes are written anew.
    pub rewritten_bytes: u64,
    /// About as many bytes are freed by that.
    pub freed_after_repack_bytes: u64,
    /// Every pack, by id.
    pub packs: Vec<GcPack>,
    /// Pages that are gathered first, for the images below.
    pub gathered_pages: u64,
    /// About as many bytes are read for it, and written anew.
    pub gathered_bytes: u64,
    /// Stored bytes that are kept twice now: copies, in older packs, of what
    /// was gathered or repacked.
    pub kept_twice_bytes: u64,
    /// Images that are straightened first; what they leave behind is not in
    /// the other figures.
    pub fragmented: Vec<GcFragmented>,
}

impl GcPlan {
    /// Packs with this action.
    #[must_use]
    pub fn with(&self, action: GcAction) -> Vec<PackId> {
        self.packs.iter().filter(|pack| pack.action == action).map(|pack| pack.pack).collect()
    }
}

/// Decides what becomes of each pack.
pub(super) fn plan(depot: &Depot, ledger: &Ledger<'_>, options: GcOptions) -> GcPlan {
    let busy = depot.pins().relied_on();
    let effort = ledger.effort();
    let mut plan =
        GcPlan { nodes_read: effort.nodes_read, counted_anew: effort.anew, ..GcPlan::default() };
    for (pack, summary) in depot.packs() {
        // A pack that came after the counting is left for the next time.
        let Some(known) = ledger.packs().get(&pack) else { continue };
        let mut row = row(pack, summary.file_len, known);
        row.action = decide(&row, options);
        if row.action != GcAction::Keep && busy.contains(&pack) {
            row.action = GcAction::Busy;
        }
        match row.action {
            GcAction::Drop => plan.freed_now_bytes += row.file_bytes,
            GcAction::Repack => {
                plan.read_bytes += row.live_stored_bytes;
                plan.rewritten_bytes += row.live_stored_bytes;
                plan.freed_after_repack_bytes +=
                    row.file_bytes.saturating_sub(row.live_stored_bytes);
            }
            GcAction::Keep | GcAction::Busy => {}
        }
        plan.packs.push(row);
    }
    plan
}

fn row(pack: PackId, file_bytes: u64, known: &PackRow) -> GcPack {
    GcPack {
        pack,
        action: GcAction::Keep,
        file_bytes,
        live_objects: known.live_objects,
        dead_objects: known.dead_objects,
        live_chunk_bytes: known.live_chunk_bytes,
        dead_chunk_bytes: known.dead_chunk_bytes,
        live_stored_bytes: known.live_stored_bytes,
        dead_stored_bytes: known.dead_stored_bytes,
    }
}

fn decide(row: &GcPack, options: GcOptions) -> GcAction {
    let all = row.live_stored_bytes + row.dead_stored_bytes;
    if row.live_objects == 0 {
        GcAction::Drop
    } else if row.dead_objects > 0
        && row.dead_stored_bytes * 100 >= all * u64::from(options.dead_percent_min)
    {
        GcAction::Repack
    } else {
        GcAction::Keep
    }
}
