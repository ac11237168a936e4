//! What is kept twice: copies of needed objects in older packs than the one
//! in which they are found. A gathering of pages leaves them behind; they go
//! with their packs.
//!
//! Invariant: an object of a pack has its bit here if and only if it is
//! needed and its bit of need is in another pack.

use std::collections::{HashMap, HashSet};

use super::bits::number;
use super::{Bits, Ledger, PAGE_ROWS};
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::index::Place;
use crate::index::rows::{
    COPIES_TOLD, COPY, OLDER, RowChange, RowKey, TWICE, copy_of, of_object, of_pack, place_from,
};
use crate::pack::EntryNo;

/// What the ledger knows of copies.
#[derive(Debug, Default)]
pub(super) struct Copies {
    /// The bits of packs that were looked at.
    bits: HashMap<PackId, Bits>,
    /// Where else objects lie that were looked at.
    older: HashMap<ObjectKey, Places>,
    /// Packs with objects that older ones have too, and these.
    younger_packs: HashSet<PackId>,
    older_packs: HashSet<PackId>,
    /// That any pack may have copies: the index was begun before anyone noted it.
    unknown: bool,
}

#[derive(Debug, Default, Clone)]
struct Places {
    places: Vec<Place>,
    is_changed: bool,
}

impl Copies {
    /// Objects whose places are held.
    pub(super) fn held(&self) -> usize {
        self.older.len()
    }
}

impl Ledger<'_> {
    /// Reads which packs have copies of others.
    pub(super) fn learn_copies(&mut self) -> Result<(), StoreError> {
        let told = self.depot.index().rows(&[vec![COPIES_TOLD]])?;
        let mut copies = std::mem::take(&mut self.copies);
        copies.unknown = told.iter().all(Option::is_none);
        self.each_row(&[COPY], |key, _| {
            if let Some((younger, older)) = copy_of(&key) {
                copies.younger_packs.insert(younger);
                copies.older_packs.insert(older);
            }
            Ok(())
        })?;
        self.copies = copies;
        Ok(())
    }

    /// Finds the copies in a pack that is new to the ledger, of objects that
    /// younger packs had already.
    pub(super) fn learn_copies_in(&mut self, pack: PackId) -> Result<(), StoreError> {
        if !self.copies.unknown && !self.copies.older_packs.contains(&pack) {
            return Ok(());
        }
        let directory = self.depot.directory(pack)?;
        for (keys, first) in directory.keys.chunks(PAGE_ROWS).zip((0_u32..).step_by(PAGE_ROWS)) {
            let found = self.depot.index().get_many(keys)?;
            for ((key, place), entry) in keys.iter().zip(found).zip(first..) {
                if place.is_some_and(|place| place.pack != pack) {
                    self.add_copy(*key, Place { pack, entry: EntryNo(entry) })?;
                }
            }
            self.spill()?;
        }
        Ok(())
    }

    /// Notes that an object is found in a younger pack from now on.
    pub(super) fn add_copy(&mut self, key: ObjectKey, at: Place) -> Result<(), StoreError> {
        let older = self.older(key)?;
        if !older.places.contains(&at) {
            older.places.push(at);
            older.is_changed = true;
        }
        let held = self.count(key)?;
        self.tell_copies(key, held.at, held.count.is_needed())
    }

    /// Where else an object lies.
    fn older(&mut self, key: ObjectKey) -> Result<&mut Places, StoreError> {
        if !self.copies.older.contains_key(&key) {
            let row = self.depot.index().rows(&[of_object(OLDER, key)])?;
            let row = row.into_iter().flatten().next().unwrap_or_default();
            let (places, _) = row.as_chunks::<8>();
            let places = places.iter().filter_map(|place| place_from(place)).collect();
            self.copies.older.insert(key, Places { places, is_changed: false });
        }
        self.copies.older.get_mut(&key).ok_or(StoreError::Ledger)
    }

    /// Sets the bits of the copies of an object, which is needed at a place or
    /// not at all.
    pub(super) fn tell_copies(
        &mut self,
        key: ObjectKey,
        at: Option<Place>,
        is_needed: bool,
    ) -> Result<(), StoreError> {
        let may_have = at.is_some_and(|at| self.copies.younger_packs.contains(&at.pack))
            || self.copies.unknown;
        if !may_have && !self.copies.older.contains_key(&key) {
            return Ok(());
        }
        for place in self.older(key)?.places.clone() {
            // A pack that went took its bits along.
            if self.settled.contains(&place.pack) {
                self.set_twice(place, is_needed && at != Some(place))?;
            }
        }
        Ok(())
    }

    fn set_twice(&mut self, place: Place, is_twice: bool) -> Result<(), StoreError> {
        let bits = self.twice(place.pack)?;
        let changed =
            if is_twice { bits.insert(number(place)) } else { bits.remove(number(place)) };
        if changed {
            self.touched.insert(place.pack);
        }
        Ok(())
    }

    /// The objects of a pack that are kept twice.
    pub(super) fn twice(&mut self, pack: PackId) -> Result<&mut Bits, StoreError> {
        if !self.copies.bits.contains_key(&pack) {
            let row = self.depot.index().rows(&[of_pack(TWICE, pack)])?;
            let bits = row.into_iter().flatten().next().map(|row| Bits::decode(&row));
            self.copies.bits.insert(pack, bits.unwrap_or_default());
        }
        self.copies.bits.get_mut(&pack).ok_or(StoreError::Ledger)
    }

    /// Forgets the copies in a pack. The pack is about to be retired.
    pub(super) fn forget_copies_in(&mut self, pack: PackId) -> Result<(), StoreError> {
        self.copies.bits.remove(&pack);
        if !self.copies.unknown && !self.copies.older_packs.contains(&pack) {
            return Ok(());
        }
        let directory = self.depot.directory(pack)?;
        for keys in directory.keys.chunks(PAGE_ROWS) {
            let rows: Vec<RowKey> = keys.iter().map(|key| of_object(OLDER, *key)).collect();
            let found = self.depot.index().rows(&rows)?;
            for (key, row) in keys.iter().zip(found) {
                if row.is_none() && !self.copies.older.contains_key(key) {
                    continue;
                }
                let older = self.older(*key)?;
                let before = older.places.len();
                older.places.retain(|place| place.pack != pack);
                older.is_changed |= older.places.len() != before;
            }
            self.spill()?;
        }
        Ok(())
    }

    /// The rows of the places that changed; none is held any more.
    pub(super) fn copy_rows(&mut self) -> Vec<RowChange> {
        let held = std::mem::take(&mut self.copies.older);
        let row = |(key, older): (_, Places)| {
            let places = older.places.iter().flat_map(|place| place.to_bits().to_le_bytes());
            let places: Vec<u8> = places.collect();
            (of_object(OLDER, key), (!places.is_empty()).then_some(places))
        };
        held.into_iter().filter(|(_, older)| older.is_changed).map(row).collect()
    }
}
