//! Processes kept ready, so that a fork does not wait for one.
//!
//! Invariant: a thread of its own forks one for each that is taken, until as
//! many wait as were asked for. Whoever finds none forks one himself. Who will
//! take many says so, and more are kept ready until he has them.

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
    /// How many will be taken soon, and by how many who said so.
    expected: usize,
    expecting: usize,
    closed: bool,
}

/// Processes that are made ahead for a batch: each of them waits most of the
/// time, for the kernel to set up its machine.
const AHEAD: usize = 32;

/// Somebody who takes many processes. Dropping it tells that no more are to come.
#[derive(Debug)]
pub struct Expected<'a>(&'a Nursery);

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        let mut state = self.0.shared.lock();
        state.expecting -= 1;
        if state.expecting == 0 {
            state.expected = 0;
        }
    }
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

    /// Says that so many processes are taken soon.
    pub fn expect(&self, count: usize) -> Expected<'_> {
        let mut state = self.shared.lock();
        state.asked = true;
        state.expected = state.expected.saturating_add(count);
        state.expecting += 1;
        self.shared.taken.notify_one();
        Expected(self)
    }

    /// A process that is ready, or a new one.
    pub fn take(&self) -> Result<Unborn, PeerError> {
        let ready = {
            let mut state = self.shared.lock();
            state.asked = true;
            state.expected = state.expected.saturating_sub(1);
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
            let wanted = self.wanted.max(state.expected.min(AHEAD));
            if state.asked && state.ready.len() < wanted {
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
