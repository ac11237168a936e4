//! Saving the ledger: in one step if it fits, or else as one that is invalid
//! until the last step.

use super::rows::Count;
use super::{Bits, Ledger, VERSION};
use crate::error::StoreError;
use crate::id::PackId;
use crate::index::rows::{COUNT, LIVE, PACK, RowChange, TWICE, VALID, of_object, of_pack};

/// Counts held in memory at once.
const HELD_MAX: usize = 1 << 18;
/// Rows changed in one step.
const STEP_ROWS: usize = 1 << 16;

impl Ledger<'_> {
    /// Writes counts out if there are too many for memory.
    pub(super) fn spill(&mut self) -> Result<(), StoreError> {
        if self.held.len() + self.copies.held() < HELD_MAX {
            return Ok(());
        }
        let mut rows = self.count_rows();
        rows.append(&mut self.copy_rows());
        self.put(&[(vec![VALID], None)])?;
        rows.chunks(STEP_ROWS).try_for_each(|step| self.put(step))
    }

    fn count_rows(&mut self) -> Vec<RowChange> {
        let held = std::mem::take(&mut self.held);
        let row = |(key, held): (_, super::Held)| {
            let keeps = held.count.is_needed() && held.count != Count::ONE;
            (of_object(COUNT, key), keeps.then(|| held.count.encode()))
        };
        held.into_iter().filter(|(_, held)| held.is_changed).map(row).collect()
    }

    fn put(&self, rows: &[RowChange]) -> Result<(), StoreError> {
        self.depot.index().put_rows(self.generation, rows)
    }

    /// Saves everything. A ledger that lacks something is good until it is
    /// dropped, and invalid from then on.
    pub(crate) fn save(&mut self) -> Result<(), StoreError> {
        let mut rows = self.count_rows();
        rows.append(&mut self.copy_rows());
        rows.append(&mut self.changes);
        for pack in std::mem::take(&mut self.touched) {
            rows.extend(self.pack_rows(pack)?);
        }
        self.fresh_events.clear();
        let valid = if self.is_doubtful { None } else { Some(VERSION.to_vec()) };
        if rows.len() > STEP_ROWS || self.is_doubtful {
            self.put(&[(vec![VALID], None)])?;
        }
        while rows.len() > STEP_ROWS {
            self.put(&rows.split_off(rows.len() - STEP_ROWS))?;
        }
        rows.push((vec![VALID], valid));
        self.put(&rows)
    }

    fn pack_rows(&mut self, pack: PackId) -> Result<[RowChange; 3], StoreError> {
        let row = self.measure(pack)?;
        self.packs.insert(pack, row);
        let rows = |bits: &Bits| (!bits.is_empty()).then(|| bits.encode());
        let live = (of_pack(LIVE, pack), rows(self.bits(pack)?));
        let twice = (of_pack(TWICE, pack), rows(self.twice(pack)?));
        Ok([(of_pack(PACK, pack), Some(row.encode())), live, twice])
    }
}
