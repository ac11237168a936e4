//! The ledger: what is needed of the store, kept from one collection to the
//! next, so that a collection costs what came and what died since.
//!
//! It holds how often each object is referenced, a bit for each object of each
//! pack that is needed, and what lives in each pack in bytes. What was listed
//! or leased when it was last brought up to date is part of it: images that
//! are new are walked, but only nodes that nobody referenced before; images
//! that are gone are walked, but only nodes that nobody references any more.
//! Chunks are counted by leaves; a chunk that one leaf references takes no
//! row, only its bit.
//!
//! Invariants:
//! - it is derived, and lies in the index: if a crash takes a part of the
//!   index away, it goes back to the same instant. A change too large for one
//!   step begins by declaring the ledger invalid;
//! - a needed object has its bit where the index finds it, or where it found
//!   it before it moved: a row tells the way, written by whoever published the
//!   younger pack, in the same step;
//! - when it does not add up, or lacks an object that it should count, it is
//!   thrown away and taken anew. The full mark is its oracle.

mod bits;
mod count;
mod events;
mod held;
mod mark;
mod measure;
mod moved;
mod rows;
mod save;
pub(crate) mod share;
#[cfg(test)]
mod tests;
mod twice;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

pub(crate) use bits::{Bits, Places};
pub(crate) use mark::mark;
pub(crate) use rows::PackRow;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use rows::decode_any as decode_rows;

use crate::catalog::Entry;
use crate::depot::Depot;
use crate::error::{ErrorKind, StoreError};
use crate::id::{ObjectKey, PackId, SnapshotId};
use crate::index::rows::{
    COPIES_TOLD, COPY, EVENT, IMAGE, LOOKED, MOVED, PACK, RowChange, RowKey, SNAPSHOT, VALID,
    pack_of,
};
use crate::tree::ImageRef;
use held::Held;

/// Rows read at once.
const PAGE_ROWS: usize = 4096;
/// Says which kind of rows these are.
const VERSION: &[u8] = &[2];

/// What everything that is needed is reached from.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Roots {
    pub(crate) images: HashSet<ImageRef>,
    pub(crate) snapshots: HashSet<SnapshotId>,
}

impl Roots {
    pub(crate) fn of(entries: &[Entry], leased: Vec<ImageRef>) -> Self {
        let images = entries.iter().flat_map(|entry| &entry.record.images);
        let mut images: HashSet<ImageRef> = images.map(|(_, image)| *image).collect();
        images.extend(leased);
        Self { images, snapshots: entries.iter().map(|entry| entry.id).collect() }
    }
}

/// What it took to bring the ledger up to date.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Effort {
    /// Tree nodes that were read.
    pub(crate) nodes_read: u64,
    /// Whether everything was counted, because nothing was known.
    pub(crate) anew: bool,
}

/// The ledger of a store. Whoever has it holds the depot's upkeep.
#[derive(Debug)]
pub(crate) struct Ledger<'d> {
    depot: &'d Depot,
    /// The index's, when the ledger was opened.
    generation: u64,
    /// What was counted.
    roots: Roots,
    /// Packs whose moved objects were settled.
    settled: BTreeSet<PackId>,
    packs: BTreeMap<PackId, PackRow>,
    /// The bits of packs that were looked at.
    live: HashMap<PackId, Bits>,
    /// Packs whose bits or rows are not saved.
    touched: BTreeSet<PackId>,
    held: HashMap<ObjectKey, Held>,
    /// References to chunks that wait to be counted together.
    pending: HashMap<ObjectKey, i64>,
    /// Events found in packs that the ledger did not know.
    fresh_events: HashMap<SnapshotId, HashSet<ObjectKey>>,
    changes: Vec<RowChange>,
    copies: twice::Copies,
    /// Something that is needed is not there: nothing of this is kept.
    is_doubtful: bool,
    effort: Effort,
}

impl<'d> Ledger<'d> {
    /// The ledger, brought up to date with what is needed now.
    pub(crate) fn current(depot: &'d Depot, roots: &Roots) -> Result<Self, StoreError> {
        if let Some(ledger) = Self::open(depot) {
            let follow = ledger.and_then(|mut ledger| ledger.follow(roots).map(|()| ledger));
            match follow {
                // What nobody needs any more may be damaged, and need not be
                // read when everything is counted anew.
                Err(error) if matches!(error, StoreError::Ledger) || is_damage(&error) => {
                    tracing::warn!(%error, "references are counted anew");
                }
                outcome => return outcome,
            }
        }
        Self::anew(depot, roots).or_else(|error| match error {
            // An index whose last change failed goes back at the next one,
            // which may be the first of these.
            StoreError::Ledger => Self::anew(depot, roots),
            error => Err(error),
        })
    }

    /// Counts everything, whatever was known.
    pub(crate) fn anew(depot: &'d Depot, roots: &Roots) -> Result<Self, StoreError> {
        let mut ledger = Self::empty(depot);
        ledger.effort.anew = true;
        ledger.forget_rows()?;
        ledger.learn_copies()?;
        ledger.learn_packs()?;
        ledger.follow(roots)?;
        Ok(ledger)
    }

    fn empty(depot: &'d Depot) -> Self {
        Self {
            depot,
            generation: depot.index().generation(),
            roots: Roots::default(),
            settled: depot.packs().into_iter().map(|(pack, _)| pack).collect(),
            packs: BTreeMap::new(),
            live: HashMap::new(),
            touched: BTreeSet::new(),
            held: HashMap::new(),
            pending: HashMap::new(),
            fresh_events: HashMap::new(),
            changes: Vec::new(),
            copies: twice::Copies::default(),
            is_doubtful: false,
            effort: Effort::default(),
        }
    }

    /// The ledger as it was saved; `None` if there is none.
    fn open(depot: &'d Depot) -> Option<Result<Self, StoreError>> {
        let mut ledger = Self::empty(depot);
        match ledger.load() {
            Ok(true) => Some(Ok(ledger)),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        }
    }

    fn load(&mut self) -> Result<bool, StoreError> {
        let valid = self.depot.index().rows(&[vec![VALID]])?;
        if valid.first().cloned().flatten().as_deref() != Some(VERSION) {
            return Ok(false);
        }
        let mut packs = BTreeMap::new();
        self.each_row(&[PACK], |key, value| {
            let pack = pack_of(&key).ok_or(StoreError::Ledger)?;
            packs.insert(pack, PackRow::decode(&value).map_err(|_| StoreError::Ledger)?);
            Ok(())
        })?;
        if packs.keys().any(|pack| !self.settled.contains(pack)) {
            return Ok(false);
        }
        self.packs = packs;
        let mut roots = Roots::default();
        self.each_row(&[IMAGE], |key, _| {
            let image = rows::decode_image(&key[1..]).map_err(|_| StoreError::Ledger)?;
            roots.images.insert(image);
            Ok(())
        })?;
        self.each_row(&[SNAPSHOT], |key, _| {
            let id = rows::decode_snapshot(&key[1..]).map_err(|_| StoreError::Ledger)?;
            roots.snapshots.insert(id);
            Ok(())
        })?;
        self.roots = roots;
        self.settle()?;
        Ok(true)
    }

    fn each_row(
        &self,
        prefix: &[u8],
        mut visit: impl FnMut(RowKey, Vec<u8>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut after = Vec::new();
        loop {
            let rows = self.depot.index().rows_behind(prefix, &after, PAGE_ROWS)?;
            let Some((last, _)) = rows.last() else { return Ok(()) };
            after.clone_from(last);
            rows.into_iter().try_for_each(|(key, value)| visit(key, value))?;
        }
    }

    /// Removes all rows but those of moves that happen meanwhile, and what is
    /// not of the counts.
    fn forget_rows(&mut self) -> Result<(), StoreError> {
        let mut gone: Vec<RowChange> = vec![(vec![VALID], None)];
        let index = self.depot.index();
        let (settled, generation) = (&self.settled, self.generation);
        self.each_row(&[], |key, _| {
            let is_new = key[0] == MOVED && pack_of(&key).is_none_or(|p| !settled.contains(&p));
            if !is_new && ![COPY, COPIES_TOLD, LOOKED].contains(&key[0]) {
                gone.push((key, None));
            }
            if gone.len() > PAGE_ROWS {
                index.put_rows(generation, &std::mem::take(&mut gone))?;
            }
            Ok(())
        })?;
        index.put_rows(generation, &gone)
    }

    /// Brings the ledger up to date and saves it.
    pub(crate) fn follow(&mut self, roots: &Roots) -> Result<(), StoreError> {
        self.settle()?;
        self.learn_packs()?;
        self.count_roots(roots)?;
        self.save()
    }

    /// Rows of all packs that were known when the ledger was last brought up
    /// to date.
    pub(crate) fn packs(&self) -> &BTreeMap<PackId, PackRow> {
        &self.packs
    }

    /// Stored bytes of copies, in older packs, of what is needed.
    pub(crate) fn kept_twice(&self) -> u64 {
        self.packs.values().map(|row| row.twice_stored_bytes).sum()
    }

    /// As [`Ledger::kept_twice`], at the moment when everything was counted
    /// last; `None` if it never was.
    pub(crate) fn kept_twice_when_counted(depot: &'d Depot) -> Result<Option<u64>, StoreError> {
        let valid = depot.index().rows(&[vec![VALID]])?;
        if valid.first().cloned().flatten().as_deref() != Some(VERSION) {
            return Ok(None);
        }
        let mut sum = 0;
        Self::empty(depot).each_row(&[PACK], |_, value| {
            let row = PackRow::decode(&value).map_err(|_| StoreError::Ledger)?;
            sum += row.twice_stored_bytes;
            Ok(())
        })?;
        Ok(Some(sum))
    }

    /// Which objects of a pack are needed.
    pub(crate) fn needed_in(&mut self, pack: PackId) -> Result<&Bits, StoreError> {
        Ok(self.bits(pack)?)
    }

    /// What it took.
    pub(crate) fn effort(&self) -> Effort {
        self.effort
    }

    /// The first pack in which the ledger and a mark differ.
    pub(crate) fn differs_from(&mut self, marked: &Places) -> Result<Option<PackId>, StoreError> {
        for (pack, _) in self.depot.packs() {
            let other = marked.packs.get(&pack).cloned().unwrap_or_default();
            let count = self.depot.directory(pack)?.keys.len();
            let own = self.bits(pack)?;
            if (0..count).any(|entry| own.contains(entry) != other.contains(entry)) {
                return Ok(Some(pack));
            }
        }
        Ok(None)
    }
}

fn is_damage(error: &StoreError) -> bool {
    error.kind() == ErrorKind::Corrupt
}

/// The row of an event about a snapshot.
fn event_row(snapshot: &SnapshotId, key: ObjectKey) -> RowKey {
    let mut row = vec![EVENT];
    row.extend_from_slice(snapshot.as_bytes());
    row.extend_from_slice(&key.0);
    row
}
