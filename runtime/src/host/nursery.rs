//! Processes kept ready, so that a fork does not wait for one.
//!
//! Invariant: a thread of its own forks one for each that is taken, until as
//! many wait as were asked for. Whoever finds none forks one himself.

use std::collections::VecDeque;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::peer::PeerError;
use super::process::Program;
use super::zygote::{Unborn, Zygote};

/// A zygote and the processes that wait.
#[derive(Debug)]
pub struct Nursery {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    program: Program,
    log: PathBuf,
    wanted: usize,
    state: Mutex<State>,
    taken: Condvar,
    /// Started when it is first needed, and again if it has ended.
    zygote: Mutex<Option<Arc<Zygote>>>,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Unborn>,
    /// Nobody fills it before the first machine is wanted.
    asked: bool,
    closed: bool,
}

impl Nursery {
    /// Keeps `wanted` processes ready from the first one on that is taken.
    /// The zygote writes its log to the file `log`.
    pub fn new(program: Program, log: PathBuf, wanted: usize) -> Result<Self, PeerError> {
        let shared = Arc::new(Shared {
            program,
            log,
            wanted,
            state: Mutex::default(),
            taken: Condvar::new(),
            zygote: Mutex::default(),
        });
        let filler = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("nursery".to_owned())
            .stack_size(256 << 10)
            .spawn(move || filler.fill())
            .map_err(|source| PeerError::Spawn { process: "the nursery".to_owned(), source })?;
        Ok(Self { shared })
    }

    /// A process that is ready, or a new one.
    pub fn take(&self) -> Result<Unborn, PeerError> {
        let ready = {
            let mut state = self.shared.lock();
            state.asked = true;
            std::iter::from_fn(|| state.ready.pop_front()).find(Unborn::lives)
        };
        let taken = ready.map_or_else(|| self.shared.fork(), Ok);
        self.shared.taken.notify_one();
        taken
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.ready.clear();
        self.shared.taken.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self) {
        let mut state = self.lock();
        while !state.closed {
            if state.asked && state.ready.len() < self.wanted {
                drop(state);
                let forked = self.fork();
                state = self.lock();
                match forked {
                    Ok(unborn) => {
                        state.ready.push_back(unborn);
                        continue;
                    }
                    // Whoever needs one is told; until then nobody is hurt.
                    Err(error) => tracing::warn!(%error, "no process is kept ready"),
                }
            }
            state = self.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn fork(&self) -> Result<Unborn, PeerError> {
        let zygote = self.zygote()?;
        match zygote.fork() {
            Err(PeerError::Gone { .. }) => {
                self.forget(&zygote);
                self.zygote()?.fork()
            }
            forked => forked,
        }
    }

    fn zygote(&self) -> Result<Arc<Zygote>, PeerError> {
        let mut slot = self.zygote.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(zygote) = &*slot {
            return Ok(Arc::clone(zygote));
        }
        let log = File::options().create(true).append(true).open(&self.log);
        let log =
            log.map_err(|source| PeerError::Spawn { process: "the zygote".to_owned(), source })?;
        Ok(Arc::clone(slot.insert(Arc::new(Zygote::spawn(&self.program, &log)?))))
    }

    fn forget(&self, ended: &Arc<Zygote>) {
        let mut slot = self.zygote.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.as_ref().is_some_and(|zygote| Arc::ptr_eq(zygote, ended)) {
            *slot = None;
        }
    }
}
