//! What a check found.

use std::collections::{BTreeSet, HashMap};

use serde::Serialize;

use crate::depot::Depot;
use crate::error::{ErrorKind, StoreError};
use crate::id::{ChunkId, ObjectKey, PackId};
use crate::pack::FrameKind;

/// One thing that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The pack that it lies in, if it lies in one.
    pub pack: Option<PackId>,
    /// Bytes from the start of the pack.
    pub offset: Option<u64>,
    /// What is wrong.
    pub problem: String,
    /// The objects that are hit: whole chunk ids where a snapshot needs them,
    /// else the first 40 digits of the ids.
    pub objects: BTreeSet<String>,
    /// Names of the snapshots that need them, or ids of those without a name.
    pub snapshots: BTreeSet<String>,
}

/// The result of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Packs read.
    pub packs: u64,
    /// Frames read.
    pub frames: u64,
    /// Frames of pages that the check was told not to read.
    pub skipped_frames: u64,
    /// Chunks hashed.
    pub chunks: u64,
    /// Bytes of the packs.
    pub bytes: u64,
    /// Snapshots followed.
    pub snapshots: u64,
    /// Damaged frames that nothing needs, because their objects were stored
    /// again elsewhere.
    pub healed_frames: u64,
    /// The packs that they lie in; a repair puts these aside too, so that
    /// nothing ever inherits from a damaged frame.
    pub healed_packs: BTreeSet<PackId>,
    /// Whether the ledger of what is needed said something else than the trees
    /// do. It was counted anew; nothing is lost by it.
    pub recounted: bool,
    /// What is wrong; empty if all is well.
    pub damages: Vec<Damage>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.damages.is_empty()
    }
}

/// A frame that cannot be used.
#[derive(Debug)]
struct BadFrame {
    damage: Damage,
    keys: Vec<ObjectKey>,
}

/// What was found so far.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) report: CheckReport,
    frames: HashMap<(PackId, u64), BadFrame>,
    /// Objects that are in no pack at all, by their kind and id.
    missing: HashMap<String, Damage>,
}

impl Findings {
    /// A frame is bad, or an object in it.
    pub(super) fn bad_frame(
        &mut self,
        pack: PackId,
        offset: u64,
        problem: String,
        keys: &[ObjectKey],
    ) {
        self.frames.entry((pack, offset)).or_insert_with(|| BadFrame {
            damage: Damage {
                pack: Some(pack),
                offset: Some(offset),
                problem,
                objects: BTreeSet::new(),
                snapshots: BTreeSet::new(),
            },
            keys: keys.to_vec(),
        });
    }

    /// Something else is wrong with a pack or the index.
    pub(super) fn bad_pack(&mut self, pack: PackId, offset: Option<u64>, problem: String) {
        self.report.damages.push(Damage {
            pack: Some(pack),
            offset,
            problem,
            objects: BTreeSet::new(),
            snapshots: BTreeSet::new(),
        });
    }

    /// Whether the frame is bad.
    pub(super) fn is_bad(&self, pack: PackId, offset: u64) -> bool {
        self.frames.contains_key(&(pack, offset))
    }

    /// A snapshot needs a chunk in a bad frame.
    pub(super) fn hit_chunk(&mut self, pack: PackId, offset: u64, chunk: &ChunkId, who: &str) {
        if let Some(frame) = self.frames.get_mut(&(pack, offset)) {
            frame.damage.objects.insert(chunk.to_string());
            frame.damage.snapshots.insert(who.to_owned());
        }
    }

    /// A snapshot needs an object that cannot be had.
    pub(super) fn hit_by_error(&mut self, error: &StoreError, who: &str) {
        let damage = match error {
            StoreError::Damaged { pack, offset, .. } => {
                self.bad_frame(*pack, *offset, error.to_string(), &[]);
                self.frames.get_mut(&(*pack, *offset)).map(|frame| &mut frame.damage)
            }
            _ => Some(self.missing.entry(error.to_string()).or_insert_with(|| Damage {
                pack: None,
                offset: None,
                problem: error.to_string(),
                objects: BTreeSet::new(),
                snapshots: BTreeSet::new(),
            })),
        };
        if let Some(damage) = damage {
            damage.snapshots.insert(who.to_owned());
        }
    }

    /// Sorts what was found, and stops deduplication against what is bad.
    pub(super) fn settle(mut self, depot: &Depot) -> Result<CheckReport, StoreError> {
        let mut distrusted = Vec::new();
        for (at, mut frame) in self.frames {
            let needed = still_there(depot, at, &frame.keys)?;
            if needed.is_empty() && frame.damage.snapshots.is_empty() && !frame.keys.is_empty() {
                self.report.healed_frames += 1;
                self.report.healed_packs.insert(at.0);
                continue;
            }
            let objects = &mut frame.damage.objects;
            for key in &needed {
                let short = key.to_string();
                if !objects.iter().any(|whole| whole.starts_with(&short)) {
                    objects.insert(short);
                }
            }
            distrusted.extend(needed);
            self.report.damages.push(frame.damage);
        }
        if !distrusted.is_empty() {
            depot.distrust(&distrusted)?;
        }
        self.report.damages.extend(self.missing.into_values());
        self.report.damages.sort_by_key(|damage| (damage.pack, damage.offset));
        Ok(self.report)
    }
}

/// Those objects of a bad frame for which the index still names this frame.
fn still_there(
    depot: &Depot,
    (pack, offset): (PackId, u64),
    keys: &[ObjectKey],
) -> Result<Vec<ObjectKey>, StoreError> {
    let mut there = Vec::new();
    for key in keys {
        let place = depot.place(*key)?.filter(|place| place.pack == pack);
        let Some(place) = place else { continue };
        // Where the tables cannot be read, it is not known to be elsewhere.
        let location = match depot.location(place) {
            Err(error) if error.kind() == ErrorKind::Internal => return Err(error),
            location => location.ok().flatten(),
        };
        if location.is_none_or(|location| location.span.offset == offset) {
            there.push(*key);
        }
    }
    Ok(there)
}

/// What a frame holds, in words.
pub(super) fn describe(kind: FrameKind) -> &'static str {
    match kind {
        FrameKind::Pages => "a frame of pages",
        FrameKind::Objects => "a frame of tree nodes",
        FrameKind::Pieces => "a frame of chunks",
        FrameKind::Catalog => "a frame of the catalog's history",
    }
}
