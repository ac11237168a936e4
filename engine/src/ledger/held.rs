//! Counts in memory, and the bits that go with them.

use super::bits::number;
use super::rows::Count;
use super::{Bits, Ledger};
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::index::Place;
use crate::index::rows::{COUNT, LIVE, RowKey, moved, of_object, of_pack, place_from};

/// An object whose count was looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    pub(super) count: Count,
    /// Where its bit is, or would be; `None` if it is in no pack.
    pub(super) at: Option<Place>,
    /// Whether its row must be written.
    pub(super) is_changed: bool,
}

/// What a change of a count meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    /// A tree or the catalog references it now and did not before, or the
    /// other way round.
    pub(super) referenced: bool,
    /// It is needed now and was not before, or the other way round.
    pub(super) needed: bool,
}

impl Ledger<'_> {
    /// The bits of a pack.
    pub(super) fn bits(&mut self, pack: PackId) -> Result<&mut Bits, StoreError> {
        if !self.live.contains_key(&pack) {
            let row = self.depot.index().rows(&[of_pack(LIVE, pack)])?;
            let bits = row.into_iter().flatten().next().map(|row| Bits::decode(&row));
            self.live.insert(pack, bits.unwrap_or_default());
        }
        self.live.get_mut(&pack).ok_or(StoreError::Ledger)
    }

    pub(super) fn is_live(&mut self, place: Place) -> Result<bool, StoreError> {
        Ok(self.bits(place.pack)?.contains(number(place)))
    }

    pub(super) fn set_live(&mut self, place: Place, is_live: bool) -> Result<(), StoreError> {
        let bits = self.bits(place.pack)?;
        let changed = if is_live { bits.insert(number(place)) } else { bits.remove(number(place)) };
        if changed {
            self.touched.insert(place.pack);
        }
        Ok(())
    }

    /// Where the bit of an object is that the index finds here: an object
    /// that moved lately may have it where it was before.
    fn bit_of(&mut self, found: Place) -> Result<(Place, bool), StoreError> {
        let mut place = found;
        loop {
            if self.is_live(place)? {
                return Ok((place, true));
            }
            if self.settled.contains(&place.pack) {
                return Ok((found, false));
            }
            let row = self.depot.index().rows(&[moved(place)])?;
            match row.into_iter().flatten().next().and_then(|row| place_from(&row)) {
                Some(before) if before < place => place = before,
                // Objects move to younger packs only: these rows add up to nothing.
                Some(_) => return Err(StoreError::Ledger),
                None => return Ok((found, false)),
            }
        }
    }

    /// Looks objects up that are not held yet.
    pub(super) fn hold(&mut self, keys: &[ObjectKey]) -> Result<(), StoreError> {
        let new: Vec<ObjectKey> =
            keys.iter().filter(|key| !self.held.contains_key(*key)).copied().collect();
        let places = self.depot.index().get_many(&new)?;
        let mut live = Vec::new();
        for (key, place) in new.into_iter().zip(places) {
            let (at, is_live) = match place {
                Some(found) => self.bit_of(found).map(|(at, is_live)| (Some(at), is_live))?,
                None => (None, false),
            };
            let count = if is_live { Count::ONE } else { Count::default() };
            self.held.insert(key, Held { count, at, is_changed: false });
            if is_live {
                live.push(key);
            }
        }
        let rows: Vec<RowKey> = live.iter().map(|key| of_object(COUNT, *key)).collect();
        for (key, row) in live.iter().zip(self.depot.index().rows(&rows)?) {
            let Some(row) = row else { continue };
            let count = Count::decode(&row).map_err(|_| StoreError::Ledger)?;
            self.held.entry(*key).and_modify(|held| held.count = count);
        }
        Ok(())
    }

    /// The count of one object.
    pub(super) fn count(&mut self, key: ObjectKey) -> Result<Held, StoreError> {
        self.hold(&[key])?;
        self.held.get(&key).copied().ok_or(StoreError::Ledger)
    }

    /// Changes the count of an object.
    pub(super) fn set_count(&mut self, key: ObjectKey, count: Count) -> Result<Turn, StoreError> {
        let held = self.count(key)?;
        let before = held.count;
        let needed = before.is_needed() != count.is_needed();
        match held.at {
            Some(at) if needed => self.set_live(at, count.is_needed())?,
            Some(_) => {}
            None => self.is_doubtful = true,
        }
        self.held.insert(key, Held { count, at: held.at, is_changed: true });
        if needed {
            self.tell_copies(key, held.at, count.is_needed())?;
        }
        Ok(Turn { referenced: (before.refs > 0) != (count.refs > 0), needed })
    }

    /// Adds references, or takes them away.
    pub(super) fn add_refs(&mut self, key: ObjectKey, more: i64) -> Result<Turn, StoreError> {
        let count = self.count(key)?.count;
        let refs = added(count.refs, more)?;
        self.set_count(key, Count { refs, ..count })
    }

    /// Adds patches that need a node, or takes them away.
    pub(super) fn add_bases(&mut self, key: ObjectKey, more: i64) -> Result<Turn, StoreError> {
        let count = self.count(key)?.count;
        let bases = added(count.bases, more)?;
        self.set_count(key, Count { bases, ..count })
    }
}

fn added(count: u32, more: i64) -> Result<u32, StoreError> {
    u32::try_from(i64::from(count) + more).map_err(|_| StoreError::Ledger)
}
