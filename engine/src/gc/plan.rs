//! The plan: what a collection would do to each pack, as a plain value.

use serde::{Deserialize, Serialize};

use super::mark::Places;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::id::{PackId, Root};
use crate::pack::EntryNo;
use crate::units::{to_u32, to_u64, to_usize};

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
    /// Bytes of frames, each shared evenly among its objects: the living.
    pub live_stored_bytes: u64,
    /// Bytes of frames, each shared evenly among its objects: the dead.
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
    /// Pages that are written once more.
    pub rewritten_pages: u64,
}

/// What a collection would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcPlan {
    /// Bytes of files that go at once, without any writing.
    pub freed_now_bytes: u64,
    /// About as many bytes are written anew.
    pub rewritten_bytes: u64,
    /// About as many bytes are freed by that.
    pub freed_after_repack_bytes: u64,
    /// Every pack, by id.
    pub packs: Vec<GcPack>,
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
pub(super) fn plan(
    depot: &Depot,
    needed: &Places,
    options: GcOptions,
) -> Result<GcPlan, StoreError> {
    let busy = depot.pins().relied_on();
    let mut plan = GcPlan::default();
    for (pack, summary) in depot.packs() {
        let mut row = measure(depot, needed, pack, summary.file_len)?;
        row.action = decide(&row, options);
        if row.action != GcAction::Keep && busy.contains(&pack) {
            row.action = GcAction::Busy;
        }
        match row.action {
            GcAction::Drop => plan.freed_now_bytes += row.file_bytes,
            GcAction::Repack => {
                plan.rewritten_bytes += row.live_stored_bytes;
                plan.freed_after_repack_bytes +=
                    row.file_bytes.saturating_sub(row.live_stored_bytes);
            }
            GcAction::Keep | GcAction::Busy => {}
        }
        plan.packs.push(row);
    }
    Ok(plan)
}

fn measure(
    depot: &Depot,
    needed: &Places,
    pack: PackId,
    file_bytes: u64,
) -> Result<GcPack, StoreError> {
    let mut row = GcPack {
        pack,
        action: GcAction::Keep,
        file_bytes,
        live_objects: 0,
        dead_objects: 0,
        live_chunk_bytes: 0,
        dead_chunk_bytes: 0,
        live_stored_bytes: 0,
        dead_stored_bytes: 0,
    };
    let directory = depot.directory(pack)?;
    for span in &directory.frames {
        let first = to_usize(u64::from(span.first.0));
        let count = to_usize(u64::from(span.count));
        let live = (first..first + count).filter(|entry| needed.contains(pack, *entry)).count();
        let (live, dead) = (to_u64(live), to_u64(count - live));
        row.live_objects += live;
        row.dead_objects += dead;
        for entry in first..first + count {
            let len = directory.chunk_len(span, EntryNo(to_u32(entry)));
            match needed.contains(pack, entry) {
                true => row.live_chunk_bytes += len,
                false => row.dead_chunk_bytes += len,
            }
        }
        let live_bytes = u64::from(span.len) * live / u64::from(span.count).max(1);
        row.live_stored_bytes += live_bytes;
        row.dead_stored_bytes += u64::from(span.len) - live_bytes;
    }
    Ok(row)
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
