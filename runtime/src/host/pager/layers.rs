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
        self.lock().done.insert(layer, error);
        self.changed.notify_all();
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
