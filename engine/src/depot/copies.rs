//! Which packs have objects of others too. Whoever publishes a pack notes it,
//! so that the end of a pack costs a look at those that have copies of its
//! objects and not at all of them.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::StoreError;
use crate::id::PackId;
use crate::index::Index;
use crate::index::rows::{self, COPIES_TOLD, COPY, RowChange};

/// Rows read at once.
const PAGE_ROWS: usize = 4096;

/// The pairs of packs that have an object both, and what some of them need.
#[derive(Debug)]
pub(super) struct Copies {
    /// Older packs of each pack that has any.
    pairs: BTreeMap<PackId, BTreeSet<PackId>>,
    /// All packs that may have copies of objects of the dying ones.
    pub(super) older: BTreeSet<PackId>,
}

impl Copies {
    /// `None` if the index was begun before anyone noted copies.
    pub(super) fn of(
        index: &dyn Index,
        dying: &BTreeSet<PackId>,
    ) -> Result<Option<Self>, StoreError> {
        if index.rows(&[vec![COPIES_TOLD]])?.iter().all(Option::is_none) {
            return Ok(None);
        }
        let mut pairs: BTreeMap<PackId, BTreeSet<PackId>> = BTreeMap::new();
        let mut after = Vec::new();
        loop {
            let found = index.rows_behind(&[COPY], &after, PAGE_ROWS)?;
            let Some((last, _)) = found.last() else { break };
            after.clone_from(last);
            for (younger, older) in found.iter().filter_map(|(key, _)| rows::copy_of(key)) {
                pairs.entry(younger).or_default().insert(older);
            }
        }
        // A copy of a copy is a copy.
        let mut older = BTreeSet::new();
        let mut open: Vec<PackId> = dying.iter().copied().collect();
        while let Some(pack) = open.pop() {
            open.extend(pairs.get(&pack).into_iter().flatten().filter(|at| older.insert(**at)));
        }
        Ok(Some(Self { pairs, older }))
    }

    /// Forgets packs that are gone: what had copies of them has copies of what
    /// they had copies of.
    pub(super) fn forget(
        &self,
        index: &dyn Index,
        gone: &BTreeSet<PackId>,
    ) -> Result<(), StoreError> {
        let mut changes: Vec<RowChange> = Vec::new();
        for (younger, olders) in &self.pairs {
            let passes = !gone.contains(younger) && olders.iter().any(|older| gone.contains(older));
            let behind = if passes { Self::of(index, &BTreeSet::from([*younger]))? } else { None };
            for older in behind.iter().flat_map(|copies| &copies.older) {
                changes.push((rows::copy(*younger, *older), Some(Vec::new())));
            }
        }
        for (younger, olders) in &self.pairs {
            for older in olders {
                if gone.contains(younger) || gone.contains(older) {
                    changes.push((rows::copy(*younger, *older), None));
                }
            }
        }
        let gone_too = |(key, value): &RowChange| {
            value.is_some() && rows::copy_of(key).is_some_and(|(_, older)| gone.contains(&older))
        };
        changes.retain(|change| !gone_too(change));
        index.put_rows(index.generation(), &changes)
    }
}
