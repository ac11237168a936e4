//! Keeps the pools of this host within their budget.
//!
//! Pools that nobody maps go first, those longest that were filled longest
//! ago; then the blocks of the others in turn (`pool::evict`). Layers count,
//! but keep their pages: the store may not have them.
//!
//! Invariant: the budget is a goal, never a reason to refuse a page. What came
//! within `young` stays, however small the budget is, so whoever faults gets on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use super::pool::Pool;
use crate::protocol::PAGE_SIZE;

/// Pages that are taken from a pool before it is the next one's turn.
const BATCH: u64 = 1024;

/// When pools are too large, this part of the budget is made free.
const SLACK: u64 = 32;

/// What is kept within which budget.
#[derive(Debug)]
pub(super) struct Keeping {
    pools: Mutex<Known>,
    ended: Condvar,
    budget_pages: AtomicU64,
    young: Duration,
    tick: Duration,
}

#[derive(Debug, Default)]
struct Known {
    pools: Vec<Weak<Pool>>,
    end: bool,
}

/// The thread that does it.
#[derive(Debug)]
pub(super) struct Keeper {
    keeping: Arc<Keeping>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts the thread, without a budget.
    pub(super) fn start(young: Duration, tick: Duration) -> std::io::Result<Self> {
        let keeping = Arc::new(Keeping {
            pools: Mutex::default(),
            ended: Condvar::new(),
            budget_pages: AtomicU64::new(u64::MAX),
            young,
            tick,
        });
        let kept = Arc::clone(&keeping);
        let thread =
            std::thread::Builder::new().name("keeper".to_owned()).spawn(move || kept.run())?;
        Ok(Self { keeping, thread: Some(thread) })
    }

    /// What it keeps.
    pub(super) fn keeping(&self) -> &Arc<Keeping> {
        &self.keeping
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.keeping.known().end = true;
        self.keeping.ended.notify_all();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so already.
            drop(thread.join());
        }
    }
}

impl Keeping {
    /// Counts a pool from now on, until it is gone.
    pub(super) fn watch(&self, pool: &Arc<Pool>) {
        self.known().pools.push(Arc::downgrade(pool));
    }

    /// Changes the budget.
    pub(super) fn set_budget(&self, bytes: u64) {
        self.budget_pages.store(bytes / PAGE_SIZE, Ordering::Relaxed);
    }

    /// Whether there is room for pages that nobody has asked for.
    pub(super) fn has_room(&self) -> bool {
        let budget = self.budget_pages.load(Ordering::Relaxed);
        budget == u64::MAX || total(&self.pools()) < budget
    }

    fn run(&self) {
        loop {
            let known = self.known();
            if known.end {
                return;
            }
            drop(self.ended.wait_timeout(known, self.tick).unwrap_or_else(PoisonError::into_inner));
            let budget = self.budget_pages.load(Ordering::Relaxed);
            if budget < u64::MAX {
                self.keep(budget);
            }
        }
    }

    fn keep(&self, budget: u64) {
        let pools = self.pools();
        let held = total(&pools);
        if held <= budget {
            return;
        }
        let mut excess = held - budget + budget / SLACK;
        // The server's table has one, and so has this list.
        let (mut unused, used): (Vec<_>, Vec<_>) =
            pools.iter().partition(|pool| Arc::strong_count(pool) <= 2);
        unused.sort_by_key(|pool| std::cmp::Reverse(pool.idle()));
        for pool in unused {
            excess = excess.saturating_sub(self.take(pool, excess));
        }
        let mut went = u64::MAX;
        while excess > 0 && went > 0 {
            went = 0;
            for pool in &used {
                went += self.take(pool, excess.saturating_sub(went).min(BATCH));
            }
            excess = excess.saturating_sub(went);
        }
    }

    fn take(&self, pool: &Pool, pages: u64) -> u64 {
        // A kernel that cannot drop pages makes the budget void, not the pool.
        pool.evict(pages, self.young).unwrap_or(0)
    }

    /// Those that are still there.
    fn pools(&self) -> Vec<Arc<Pool>> {
        let mut known = self.known();
        known.pools.retain(|pool| pool.strong_count() > 0);
        known.pools.iter().filter_map(Weak::upgrade).collect()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn total(pools: &[Arc<Pool>]) -> u64 {
    pools.iter().map(|pool| pool.resident_pages()).sum()
}
