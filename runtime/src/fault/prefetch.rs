//! Fetching the pages that a machine will touch, while it runs.
//!
//! One thread does this for all machines, in windows: the pages of a window
//! are read with few large requests, then decoded, verified and installed one
//! frame after the other. The first windows are short, because what they
//! hold is needed first.
//!
//! Invariant: no fault waits for more than one frame that is prefetched. A
//! window is read before any of its frames is claimed; while faults wait for a
//! thread, nothing is prefetched; and nothing is prefetched for a machine that
//! is not served any more, nor beyond the budget of the pools.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use coppice_engine::ReadAhead;
use crossbeam_channel::{Receiver, Sender, unbounded};

use super::keeper::Keeping;
use super::machine::{Machine, Waiter};
use super::pool::Pool;
use super::queue::Job;
use super::worker::Shared;
use crate::protocol::PoolId;

/// Pages of the first window; each one after it has twice as many.
const WINDOW_FIRST: usize = 8;
/// Pages of a window at most.
const WINDOW_MAX: usize = 64;

/// How long to keep out of the way of faults that wait.
const STEP_ASIDE: Duration = Duration::from_micros(200);

/// Pages to fetch for a machine.
struct Task {
    machine: Arc<Machine>,
    pages: Vec<(Arc<Pool>, u64)>,
}

/// The thread that prefetches.
#[derive(Debug)]
pub(super) struct Prefetcher {
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetcher {
    /// Starts the thread.
    pub(super) fn start(shared: &Arc<Shared>, keeping: &Arc<Keeping>) -> std::io::Result<Self> {
        let (tasks, received) = unbounded();
        let (shared, keeping) = (Arc::clone(shared), Arc::clone(keeping));
        let thread = std::thread::Builder::new()
            .name("prefetch".to_owned())
            .spawn(move || work(&shared, &keeping, &received))?;
        Ok(Self { tasks: Some(tasks), thread: Some(thread) })
    }

    /// Begins with these pages when all earlier ones are done. Pages of pools
    /// that the machine does not map are left out.
    pub(super) fn begin(&self, machine: Arc<Machine>, pages: Vec<(PoolId, u64)>) {
        let mut pools = HashMap::new();
        let mut found = |id| pools.entry(id).or_insert_with(|| machine.pool(id).cloned()).clone();
        let pages = pages.into_iter().filter_map(|(id, page)| Some((found(id)?, page))).collect();
        if let Some(tasks) = &self.tasks {
            // The thread ends only when this is dropped.
            drop(tasks.send(Task { machine, pages }));
        }
    }

    /// Waits until the thread has ended, which it does after a frame once all
    /// is to stop.
    pub(super) fn end(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so already.
            drop(thread.join());
        }
    }
}

fn work(shared: &Shared, keeping: &Keeping, tasks: &Receiver<Task>) {
    for task in tasks {
        let (mut rest, mut window) = (task.pages.as_slice(), WINDOW_FIRST);
        while !rest.is_empty() && task.is_wanted(shared) && keeping.has_room() {
            let taken = task.window(rest, window);
            rest = &rest[taken.seen..];
            task.fetch(shared, &taken.pages);
            window = (window * 2).min(WINDOW_MAX);
        }
    }
}

/// Pages to be read together.
struct Window<'t> {
    pages: Vec<(&'t Arc<Pool>, u64)>,
    /// Pages that were looked at.
    seen: usize,
}

impl Task {
    fn is_wanted(&self, shared: &Shared) -> bool {
        !shared.is_stopping() && !self.machine.gone.load(Ordering::Relaxed)
    }

    /// The next pages that are not there.
    fn window<'t>(&self, pages: &'t [(Arc<Pool>, u64)], count: usize) -> Window<'t> {
        let mut window = Window { pages: Vec::with_capacity(count), seen: 0 };
        for (pool, page) in pages {
            if window.pages.len() == count {
                break;
            }
            window.seen += 1;
            if pool.lacks(*page).is_some() {
                window.pages.push((pool, *page));
            }
        }
        window
    }

    fn fetch(&self, shared: &Shared, pages: &[(&Arc<Pool>, u64)]) {
        let mut by_pool: HashMap<PoolId, (&Pool, Vec<u64>)> = HashMap::new();
        for (pool, page) in pages {
            by_pool.entry(pool.id()).or_insert_with(|| (pool, Vec::new())).1.push(*page);
        }
        let ahead: HashMap<PoolId, ReadAhead> =
            by_pool.iter().map(|(id, (pool, pages))| (*id, pool.read_ahead(pages))).collect();
        for (pool, page) in pages {
            while shared.is_behind() && self.is_wanted(shared) {
                std::thread::sleep(STEP_ASIDE);
            }
            if !self.is_wanted(shared) {
                return;
            }
            let Some(ahead) = ahead.get(&pool.id()) else { continue };
            self.fetch_one(shared, (pool, *page), ahead);
        }
    }

    fn fetch_one(&self, shared: &Shared, (pool, page): (&Arc<Pool>, u64), ahead: &ReadAhead) {
        let Some((frame, settled)) = pool.prefetch(page, ahead, &self.machine) else { return };
        settled.woken.iter().for_each(Waiter::wake);
        // Somebody waits for a page of the frame that this did not bring.
        if let Some(page) = settled.next {
            let (pool, machine) = (Arc::clone(pool), Arc::clone(&self.machine));
            shared.hand_over(Job { pool, frame, page, machine });
        }
    }
}
