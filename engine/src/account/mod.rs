//! Accounting: what each snapshot holds, shares, and would free.
//!
//! One walk over all listed snapshots counts how often each object is
//! referenced; each node is read once. To forget some snapshots is then a
//! simulation: references are taken away in an overlay, and only what loses
//! its last one is read. The counts are plain additions for each snapshot, so
//! a table that is kept up to date by commits can take the place of the walk.
//!
//! Invariant: the stored bytes of a frame are split among its objects by
//! plaintext length so that the shares add up to the frame exactly.

mod forget;
mod table;
#[cfg(test)]
mod tests;
mod totals;

use std::collections::HashSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::catalog::{Catalog, Entry};
use crate::depot::Depot;
use crate::error::StoreError;
use crate::id::SnapshotId;

use forget::Forgetting;
use table::Table;
pub use totals::StoreBill;
pub(crate) use totals::of_ledger;

/// What some snapshots hold and what removing all of them would free.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bill {
    /// Bytes of their images.
    pub logical_bytes: u64,
    /// Plaintext bytes of the chunks that they reach, each counted once.
    pub referenced_bytes: u64,
    /// Of these, bytes that other snapshots reach too.
    pub shared_bytes: u64,
    /// Of these, bytes that nothing else reaches.
    pub exclusive_bytes: u64,
    /// Length of the packs that nothing else needs: gone by removing files.
    pub frees_now: u64,
    /// Stored bytes, metadata included, of everything that nothing else
    /// needs: gone once the packs it shares with others are written again.
    pub frees_after_repack: u64,
    /// Tree nodes read to answer this, the counting walk apart.
    pub nodes_walked: u64,
}

/// What removing one snapshot would free.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frees {
    /// Plaintext bytes of chunks that nothing else reaches.
    pub exclusive_bytes: u64,
    /// As [`Bill::frees_now`].
    pub frees_now: u64,
    /// As [`Bill::frees_after_repack`].
    pub frees_after_repack: u64,
}

/// The reference counts of a store at one moment.
#[derive(Debug)]
pub struct Accounts {
    depot: Arc<Depot>,
    entries: Vec<Entry>,
    table: Table,
    log_len: u64,
}

impl Accounts {
    pub(crate) fn count(depot: &Arc<Depot>, catalog: &Catalog) -> Result<Self, StoreError> {
        let entries = catalog.entries();
        let log_len = catalog.log_len();
        let table = Table::count(depot, &entries)?;
        Ok(Self { depot: Arc::clone(depot), entries, table, log_len })
    }

    /// Tree nodes that the counting walk read.
    #[must_use]
    pub fn nodes_walked(&self) -> u64 {
        self.table.nodes_walked
    }

    /// What the whole store holds and where its bytes are.
    ///
    /// # Errors
    /// If the tables of a pack cannot be read.
    pub fn store(&self) -> Result<StoreBill, StoreError> {
        totals::totals(&self.depot, &self.table, self.log_len)
    }

    /// What these snapshots hold, and what removing all of them frees.
    ///
    /// # Errors
    /// If a tree cannot be read.
    pub fn bill(&self, snapshots: &HashSet<SnapshotId>) -> Result<Bill, StoreError> {
        let chosen: Vec<&Entry> =
            self.entries.iter().filter(|entry| snapshots.contains(&entry.id)).collect();
        let (chunks, read) = self.table.chunks_of(&self.depot, &chosen)?;
        let mut forgetting = Forgetting::new(&self.depot, &self.table);
        chosen.iter().try_for_each(|entry| forgetting.forget(entry))?;
        let freed = forgetting.freed()?;
        Ok(Bill {
            logical_bytes: chosen.iter().map(|entry| entry.record.logical_bytes()).sum(),
            referenced_bytes: chunks,
            shared_bytes: chunks.saturating_sub(freed.chunk_bytes),
            exclusive_bytes: freed.chunk_bytes,
            frees_now: freed.whole_packs,
            frees_after_repack: freed.shares,
            nodes_walked: read + freed.nodes_walked,
        })
    }

    /// What removing one snapshot frees; without what it holds, so that the
    /// cost follows what would die.
    ///
    /// # Errors
    /// If a tree cannot be read.
    pub fn frees(&self, id: SnapshotId) -> Result<Frees, StoreError> {
        let mut forgetting = Forgetting::new(&self.depot, &self.table);
        for entry in self.entries.iter().filter(|entry| entry.id == id) {
            forgetting.forget(entry)?;
        }
        let freed = forgetting.freed()?;
        Ok(Frees {
            exclusive_bytes: freed.chunk_bytes,
            frees_now: freed.whole_packs,
            frees_after_repack: freed.shares,
        })
    }

    /// A snapshot with everything that descends from it, as far as listed.
    #[must_use]
    pub fn subtree(&self, top: SnapshotId) -> HashSet<SnapshotId> {
        let mut all = HashSet::from([top]);
        // A child's record names its parent's hash, so parents were made
        // first; being listed again may change the order, hence the loop.
        loop {
            let before = all.len();
            for entry in &self.entries {
                if entry.record.parent.is_some_and(|parent| all.contains(&parent)) {
                    all.insert(entry.id);
                }
            }
            if all.len() == before {
                return all;
            }
        }
    }
}
