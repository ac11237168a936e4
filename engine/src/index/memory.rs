//! The index in memory, for tests and for stores without RocksDB. It is
//! rebuilt from the packs whenever the store is opened.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;

use super::rows::{self, RowChange, RowKey};
use super::{Index, PackSummary, Place, places};
use crate::env::lock;
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::pack::DurablePack;
use crate::units::to_u64;

/// Maps in memory.
#[derive(Debug)]
pub(crate) struct MemIndex {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<ObjectKey, u64>,
    packs: BTreeMap<PackId, PackSummary>,
    distrusted: HashSet<ObjectKey>,
    rows: BTreeMap<RowKey, Vec<u8>>,
    hints: HashMap<ObjectKey, Vec<u8>>,
}

impl Default for MemIndex {
    fn default() -> Self {
        let mut state = State::default();
        state.rows.insert(vec![rows::COPIES_TOLD], Vec::new());
        Self { state: Mutex::new(state) }
    }
}

impl MemIndex {
    /// Whether no object of a pack is here.
    pub(super) fn has_none_of(&self, pack: &DurablePack) -> bool {
        let state = lock(&self.state);
        places(pack).all(|(key, _)| !state.entries.contains_key(&key))
    }
}

impl Index for MemIndex {
    fn get_many(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Place>>, StoreError> {
        let state = lock(&self.state);
        Ok(keys.iter().map(|key| state.entries.get(key).copied().map(Place::from_bits)).collect())
    }

    fn publish(&self, pack: &DurablePack) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        for (key, place) in places(pack) {
            let bits = state.entries.entry(key).or_insert(0);
            let before = std::mem::replace(bits, place.to_bits().max(*bits));
            if before != 0 {
                let other = Place::from_bits(before);
                if other < place {
                    state.rows.insert(rows::moved(place), before.to_le_bytes().to_vec());
                }
                let (older, younger) = (other.min(place).pack, other.max(place).pack);
                state.rows.insert(rows::copy(younger, older), Vec::new());
            }
            state.distrusted.remove(&key);
        }
        state.packs.insert(pack.pack, PackSummary::of(pack));
        Ok(())
    }

    fn publish_new(&self, pack: &DurablePack, _generation: u64) -> Result<(), StoreError> {
        assert!(self.has_none_of(pack), "{} has what the index has already", pack.pack);
        self.publish(pack)
    }

    fn retire(&self, pack: PackId, moves: &[(ObjectKey, Option<Place>)]) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        for (key, place) in moves {
            match place {
                Some(place) => state.entries.insert(*key, place.to_bits()),
                None => state.entries.remove(key),
            };
        }
        state.packs.remove(&pack);
        for tag in [rows::LIVE, rows::PACK, rows::TWICE] {
            state.rows.remove(&rows::of_pack(tag, pack));
        }
        let moved = rows::of_pack(rows::MOVED, pack);
        state.rows.retain(|key, _| !key.starts_with(&moved));
        Ok(())
    }

    fn packs(&self) -> Result<Vec<(PackId, PackSummary)>, StoreError> {
        Ok(lock(&self.state).packs.iter().map(|(pack, summary)| (*pack, *summary)).collect())
    }

    fn clear(&self) -> Result<(), StoreError> {
        *lock(&self.state) = State::default();
        lock(&self.state).rows.insert(vec![rows::COPIES_TOLD], Vec::new());
        Ok(())
    }

    fn for_each(
        &self,
        visit: &mut dyn FnMut(ObjectKey, Place) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let state = lock(&self.state);
        state.entries.iter().try_for_each(|(key, bits)| visit(*key, Place::from_bits(*bits)))
    }

    fn distrust(&self, keys: &[ObjectKey]) -> Result<(), StoreError> {
        lock(&self.state).distrusted.extend(keys);
        Ok(())
    }

    fn hints(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        let state = lock(&self.state);
        Ok(keys.iter().map(|key| state.hints.get(key).cloned()).collect())
    }

    fn write_hints(&self, hints: &[(ObjectKey, Option<Vec<u8>>)]) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        for (key, hint) in hints {
            match hint {
                Some(bytes) => state.hints.insert(*key, bytes.clone()),
                None => state.hints.remove(key),
            };
        }
        Ok(())
    }

    fn clear_hints(&self) -> Result<(), StoreError> {
        lock(&self.state).hints.clear();
        Ok(())
    }

    fn hint_totals(&self) -> Result<(u64, u64), StoreError> {
        let state = lock(&self.state);
        let bytes = state.hints.values().map(|hint| ObjectKey::LEN + hint.len()).sum();
        Ok((to_u64(state.hints.len()), to_u64(bytes)))
    }

    fn distrusted(&self) -> Result<Vec<ObjectKey>, StoreError> {
        Ok(lock(&self.state).distrusted.iter().copied().collect())
    }

    fn rows(&self, keys: &[RowKey]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        let state = lock(&self.state);
        Ok(keys.iter().map(|key| state.rows.get(key).cloned()).collect())
    }

    fn rows_behind(
        &self,
        prefix: &[u8],
        after: &[u8],
        limit: usize,
    ) -> Result<Vec<(RowKey, Vec<u8>)>, StoreError> {
        let state = lock(&self.state);
        let begin = after.max(prefix).to_vec();
        let rows = state.rows.range(begin..).filter(|(key, _)| key.as_slice() != after);
        let rows = rows.take_while(|(key, _)| key.starts_with(prefix)).take(limit);
        Ok(rows.map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn put_rows(&self, _generation: u64, rows: &[RowChange]) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        for (key, value) in rows {
            match value {
                Some(value) => state.rows.insert(key.clone(), value.clone()),
                None => state.rows.remove(key),
            };
        }
        Ok(())
    }

    fn generation(&self) -> u64 {
        0
    }
}
