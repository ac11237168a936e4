//! An index that is only looked at: what is on disk, and in memory what the
//! owner of the store has not written there yet.
//!
//! Invariant: nothing is written. An object is found in the youngest pack of
//! both halves that has it.

use super::rows::{RowChange, RowKey};
use super::{Index, MemIndex, PackSummary, Place};
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::pack::DurablePack;

/// Two indexes as one.
#[derive(Debug)]
pub(crate) struct ViewIndex {
    base: Box<dyn Index>,
    late: MemIndex,
}

impl ViewIndex {
    /// Looks at `base`, which must be open for reading only.
    pub(crate) fn over(base: Box<dyn Index>) -> Self {
        Self { base, late: MemIndex::default() }
    }
}

impl Index for ViewIndex {
    fn get_many(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Place>>, StoreError> {
        let late = self.late.get_many(keys)?;
        // `None` is below every place.
        Ok(self.base.get_many(keys)?.into_iter().zip(late).map(|(one, two)| one.max(two)).collect())
    }

    fn publish(&self, pack: &DurablePack) -> Result<(), StoreError> {
        self.late.publish(pack)
    }

    fn publish_new(&self, pack: &DurablePack, _: u64) -> Result<(), StoreError> {
        self.late.publish(pack)
    }

    fn retire(&self, _: PackId, _: &[(ObjectKey, Option<Place>)]) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly)
    }

    fn packs(&self) -> Result<Vec<(PackId, PackSummary)>, StoreError> {
        let mut packs = self.base.packs()?;
        packs.extend(self.late.packs()?);
        packs.sort_unstable_by_key(|(pack, _)| *pack);
        Ok(packs)
    }

    fn clear(&self) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly)
    }

    fn for_each(
        &self,
        visit: &mut dyn FnMut(ObjectKey, Place) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.base.for_each(visit)?;
        self.late.for_each(visit)
    }

    fn distrust(&self, keys: &[ObjectKey]) -> Result<(), StoreError> {
        self.late.distrust(keys)
    }

    fn distrusted(&self) -> Result<Vec<ObjectKey>, StoreError> {
        let mut keys = self.base.distrusted()?;
        keys.extend(self.late.distrusted()?);
        Ok(keys)
    }

    /// Hints of the owner may name packs that are not in this view; those of
    /// the view itself are kept where they are made.
    fn hints(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        Ok(vec![None; keys.len()])
    }

    fn write_hints(&self, _: &[(ObjectKey, Option<Vec<u8>>)]) -> Result<(), StoreError> {
        Ok(())
    }

    fn clear_hints(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn hint_totals(&self) -> Result<(u64, u64), StoreError> {
        Ok((0, 0))
    }

    /// The ledger is left aside: it does not know what came later.
    fn rows(&self, keys: &[RowKey]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        Ok(vec![None; keys.len()])
    }

    fn rows_behind(
        &self,
        _: &[u8],
        _: &[u8],
        _: usize,
    ) -> Result<Vec<(RowKey, Vec<u8>)>, StoreError> {
        Ok(Vec::new())
    }

    fn put_rows(&self, _: u64, _: &[RowChange]) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly)
    }

    fn generation(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ChunkId;
    use crate::pack::{Directory, EntryNo, FrameKind};

    #[test]
    fn the_youngest_pack_of_both_halves_counts() {
        let pack = |id, numbers: std::ops::Range<u8>| {
            let keys: Vec<ObjectKey> = numbers.map(|n| ChunkId::of(&[n]).key()).collect();
            let mut directory = Directory::empty();
            directory.push(FrameKind::Pages, 100, &keys, &[]);
            DurablePack { pack: PackId(id), directory, file_len: 100 }
        };
        let base = MemIndex::default();
        base.publish(&pack(2, 0..3)).expect("published");
        let view = ViewIndex::over(Box::new(base));
        view.publish(&pack(1, 1..2)).expect("published");
        view.publish(&pack(3, 2..5)).expect("published");
        let keys: Vec<ObjectKey> = (0..6_u8).map(|n| ChunkId::of(&[n]).key()).collect();
        let place = |pack, entry| Some(Place { pack: PackId(pack), entry: EntryNo(entry) });
        assert_eq!(
            view.get_many(&keys).expect("places"),
            [place(2, 0), place(2, 1), place(3, 0), place(3, 1), place(3, 2), None]
        );
        assert!(view.clear().is_err() && view.retire(PackId(2), &[]).is_err());
        assert_eq!(view.packs().expect("packs").len(), 3);
    }
}
