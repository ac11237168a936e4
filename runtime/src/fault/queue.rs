//! Fetches that wait for a thread.
//!
//! Invariant: fewer fetches run than there are workers, so one worker always
//! answers faults that need no fetch; while a job waits here, either all
//! allowed fetches run or a nudge is on its way.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::machine::Machine;
use super::pool::Pool;
use super::source::FrameKey;

/// A fetch to be made.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) pool: Arc<Pool>,
    pub(super) frame: FrameKey,
    pub(super) page: u64,
    /// On whose account.
    pub(super) machine: Arc<Machine>,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    running: usize,
}

/// The queue.
#[derive(Debug)]
pub(super) struct Queue {
    limit: usize,
    state: Mutex<State>,
}

impl Queue {
    /// A queue that lets at most `limit` fetches run.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), state: Mutex::default() }
    }

    /// Adds a job that another thread is to take.
    pub(super) fn push(&self, job: Job) {
        self.state().waiting.push_back(job);
    }

    /// Whether a job waits until another one is over.
    pub(super) fn is_behind(&self) -> bool {
        !self.state().waiting.is_empty()
    }

    /// Asks for leave to run a job at once; otherwise it waits in the queue.
    pub(super) fn start(&self, job: Job) -> Option<Job> {
        let mut state = self.state();
        if state.running < self.limit {
            state.running += 1;
            return Some(job);
        }
        state.waiting.push_back(job);
        None
    }

    /// The oldest job, if one more may run.
    pub(super) fn take(&self) -> Option<Job> {
        let mut state = self.state();
        if state.running >= self.limit {
            return None;
        }
        let job = state.waiting.pop_front()?;
        state.running += 1;
        Some(job)
    }

    /// Ends a job, and yields the next one in its place.
    pub(super) fn finish(&self) -> Option<Job> {
        let mut state = self.state();
        let next = state.waiting.pop_front();
        if next.is_none() {
            state.running -= 1;
        }
        next
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
