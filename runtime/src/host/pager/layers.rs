//! Which layers need their machines no more.
//!
//! A table of its own: the thread that reads what the page server says writes
//! to it while others wait for answers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::protocol::PoolId;

/// The layers that are done, each with the reason if pages are lost.
#[derive(Debug, Default)]
pub(super) struct Layers {
    table: Mutex<Table>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    done: BTreeMap<PoolId, Option<String>>,
    /// Layers that are not closed.
    open: BTreeSet<PoolId>,
    /// No more news will come.
    over: bool,
}

/// What became of a layer that somebody waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It has all its pages, or was closed by whoever needed it.
    Whole,
    /// Pages are lost.
    Lost(String),
    /// There is no page server any more.
    Gone,
}

impl Layers {
    pub(super) fn opened(&self, layer: PoolId) {
        self.lock().open.insert(layer);
    }

    pub(super) fn done(&self, layer: PoolId, error: Option<String>) {
        let mut table = self.lock();
        // Nobody waits for one that is closed, and nobody would forget it.
        if table.open.contains(&layer) {
            table.done.insert(layer, error);
            self.changed.notify_all();
        }
    }

    /// What was said of a layer does not count: it was not frozen, as far as
    /// anybody knows.
    pub(super) fn begin_again(&self, layer: PoolId) {
        self.lock().done.remove(&layer);
    }

    pub(super) fn closed(&self, layer: PoolId) {
        let mut table = self.lock();
        table.done.remove(&layer);
        if table.open.remove(&layer) {
            self.changed.notify_all();
        }
    }

    /// Nothing is copied any more.
    pub(super) fn give_up(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// Whether a layer is done, and if so what is lost.
    pub(super) fn outcome(&self, layer: PoolId) -> Option<Option<String>> {
        self.lock().done.get(&layer).cloned()
    }

    /// Waits until a layer needs its machine no more.
    pub(super) fn wait_for(&self, layer: PoolId) -> Outcome {
        let mut table = self.lock();
        loop {
            match table.done.get(&layer) {
                Some(None) => return Outcome::Whole,
                Some(Some(reason)) => return Outcome::Lost(reason.clone()),
                None if table.over => return Outcome::Gone,
                None if !table.open.contains(&layer) => return Outcome::Whole,
                None => {
                    table = self.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_kept_of_a_layer_that_is_closed() {
        let layers = Layers::default();
        layers.opened(PoolId(1));
        layers.done(PoolId(1), Some("why".to_owned()));
        assert_eq!(layers.wait_for(PoolId(1)), Outcome::Lost("why".to_owned()));
        layers.closed(PoolId(1));
        layers.done(PoolId(1), None);
        let table = layers.lock();
        assert!(table.done.is_empty() && table.open.is_empty());
    }
}
