//! Which objects are needed: one bit for each object of each pack.

use std::collections::BTreeMap;

use crate::id::PackId;
use crate::index::Place;
use crate::units::to_usize;

/// A set of objects of one pack.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Bits(Vec<u64>);

impl Bits {
    /// Adds an object and says whether it is new.
    pub(crate) fn insert(&mut self, entry: usize) -> bool {
        if self.0.len() <= entry / 64 {
            self.0.resize(entry / 64 + 1, 0);
        }
        let is_new = !self.contains(entry);
        self.0[entry / 64] |= 1 << (entry % 64);
        is_new
    }

    /// Takes an object out and says whether it was there.
    pub(crate) fn remove(&mut self, entry: usize) -> bool {
        let was_there = self.contains(entry);
        if was_there {
            self.0[entry / 64] &= !(1 << (entry % 64));
        }
        was_there
    }

    /// Whether the object with this number is in the set.
    pub(crate) fn contains(&self, entry: usize) -> bool {
        self.0.get(entry / 64).is_some_and(|word| word & (1 << (entry % 64)) != 0)
    }

    /// Whether nothing is in the set.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }
}

/// A set of places.
#[derive(Debug, Default, Clone)]
pub(crate) struct Places {
    pub(crate) packs: BTreeMap<PackId, Bits>,
}

impl Places {
    /// Adds a place and says whether it is new.
    pub(crate) fn insert(&mut self, place: Place) -> bool {
        self.packs.entry(place.pack).or_default().insert(number(place))
    }
}

/// The number of an object in its pack.
pub(crate) fn number(place: Place) -> usize {
    to_usize(u64::from(place.entry.0))
}
