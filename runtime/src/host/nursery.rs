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

impl State {
    /// How many are kept ready now.
    fn kept(&self, wanted: usize) -> usize {
        wanted.max(self.expected.min(AHEAD))
    }

    /// Takes out those that are too many.
    fn excess(&mut self, wanted: usize) -> VecDeque<Unborn> {
        let kept = self.kept(wanted).min(self.ready.len());
        self.ready.split_off(kept)
    }
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
        // Those that nobody took.
        let excess = state.excess(self.0.shared.wanted);
        drop(state);
        drop(excess);
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
            if state.asked && state.ready.len() < state.kept(self.wanted) {
                drop(state);
                let forked = self.fork();
                state = self.lock();
                match forked {
                    Ok(unborn) => {
                        state.ready.push_back(unborn);
                        // Who wanted it may have given up meanwhile.
                        drop(state.excess(self.wanted));
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

#[cfg(test)]
mod tests {
    use super::super::process::Process;
    use super::*;
    use crate::sys::channel::{Channel, ChannelError};

    #[test]
    fn those_that_a_failed_batch_did_not_take_end() {
        let program = Program { path: PathBuf::from("/bin/false"), arguments: Vec::new() };
        let nursery = Nursery::new(program, PathBuf::from("/dev/null"), 2).unwrap();
        let expected = nursery.expect(20);
        let ends: Vec<Channel> = (0..20)
            .map(|_| {
                let (channel, other) = Channel::pair().unwrap();
                let process = Process::new(0, tempfile::tempfile().unwrap().into());
                nursery.shared.lock().ready.push_back(Unborn { process, channel });
                other
            })
            .collect();
        drop(expected);
        assert_eq!(nursery.shared.lock().ready.len(), 2);
        for end in &ends[2..] {
            assert!(matches!(end.receive::<u32>(), Err(ChannelError::Closed)));
        }
    }
}
