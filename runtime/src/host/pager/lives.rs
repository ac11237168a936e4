//! The page server's processes, one after the other.
//!
//! ```text
//! life 1 ── ends ──> what was told is told to life 2 ── ends ──> life 3 ...
//! ```
//!
//! A thread waits for the end of each and starts the next. Whoever asks
//! meanwhile waits for it, and whoever had asked and got no answer asks again, but
//! not so often that one request ends them all.
//!
//! Invariants: two never run at the same time (the old one has been waited for
//! before the new one is started); one lock is held over a request, its answer and
//! the note of it, and over a whole takeover.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::super::peer::{News, Peer, PeerError};
use super::super::process::Program;
use super::journal::{Inventory, Journal};
use super::layers::Layers;
use super::patience::{Ends, Patience, manner};
use crate::protocol::{MachineKey, PagerEvent, PagerMessage, PagerReply, PagerRequest, PoolId};

/// What the processes are called in errors.
pub(super) const NAME: &str = "the page server";

/// Between two attempts to start a process that cannot be started.
const START_AGAIN: Duration = Duration::from_millis(100);

/// Before the next attempt after one could not take over; twice as long each
/// time.
const TAKE_OVER_AGAIN: Duration = Duration::from_millis(100);

/// The pause is doubled so often at most.
const DOUBLINGS_MAX: u32 = 6;

type PagerPeer = Peer<PagerRequest, PagerMessage>;
type Listener = Box<dyn FnMut(News<PagerEvent>) + Send>;

/// The page server through all its lives.
pub(super) struct Lives {
    program: Program,
    log: File,
    pub(super) layers: Arc<Layers>,
    listener: Arc<Mutex<Listener>>,
    state: Mutex<State>,
    changed: Condvar,
    ended: Sender<u64>,
    pid: AtomicU32,
    takeovers: AtomicU64,
}

struct State {
    /// None between two, and after the last.
    life: Option<Life>,
    journal: Journal,
    ends: Ends,
    ends_of_a_request: usize,
    /// How many in a row could not take over.
    failed: u32,
    /// How the last one ended.
    end: Option<ExitStatus>,
    /// No other one will follow.
    over: bool,
    number: u64,
}

/// One process. Dropping it kills it and waits until it is gone.
struct Life {
    peer: PagerPeer,
    child: Child,
    /// Since it can answer whatever it is asked.
    serving: Option<Instant>,
}

impl Lives {
    /// Starts the first one, and the thread that follows them up.
    pub(super) fn begin(
        program: &Program,
        log: &File,
        patience: Patience,
        listener: Listener,
    ) -> Result<Arc<Self>, PeerError> {
        let spawn = |source| PeerError::Spawn { process: NAME.to_owned(), source };
        let (ended, ends) = unbounded();
        let state = State {
            life: None,
            journal: Journal::default(),
            ends: Ends::new(patience),
            ends_of_a_request: patience.ends_of_a_request,
            failed: 0,
            end: None,
            over: false,
            number: 0,
        };
        let lives = Arc::new(Self {
            program: program.clone(),
            log: log.try_clone().map_err(spawn)?,
            layers: Arc::default(),
            listener: Arc::new(Mutex::new(listener)),
            state: Mutex::new(state),
            changed: Condvar::new(),
            ended,
            pid: AtomicU32::new(0),
            takeovers: AtomicU64::new(0),
        });
        lives.start(&mut lives.lock())?;
        let own = Arc::clone(&lives);
        std::thread::Builder::new()
            .name("page server keeper".to_owned())
            .stack_size(256 << 10)
            .spawn(move || own.follow(&ends))
            .map_err(spawn)?;
        Ok(lives)
    }

    /// The process id of the present one.
    pub(super) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// How often one has taken over from another.
    pub(super) fn takeovers(&self) -> u64 {
        self.takeovers.load(Ordering::Relaxed)
    }

    /// How the last one ended that has ended.
    pub(super) fn last_end(&self) -> Option<ExitStatus> {
        self.lock().end
    }

    /// Asks until one answers, and notes the answer. `note` says whether the
    /// answer fits the question. A request that too many ended over is refused.
    pub(super) fn ask<T>(
        &self,
        request: &PagerRequest,
        descriptors: &[BorrowedFd<'_>],
        note: impl FnOnce(&mut Journal, PagerReply, Vec<OwnedFd>) -> Option<T>,
    ) -> Result<T, PeerError> {
        let mut state = self.lock();
        let mut ended = 0;
        loop {
            let Some(life) = state.life.as_ref().filter(|life| life.serving.is_some()) else {
                if state.over {
                    return Err(PeerError::Gone { process: NAME.to_owned() });
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            match life.peer.call(request, descriptors) {
                // The keeper is told of its end, and starts the next one.
                Err(PeerError::Gone { .. }) => {
                    ended += 1;
                    if ended >= state.ends_of_a_request {
                        return Err(deadly(ended));
                    }
                    state = self.next(state);
                }
                Err(error) => return Err(error),
                Ok((reply, received)) => {
                    return note(&mut state.journal, reply, received)
                        .ok_or(PeerError::OutOfTurn { process: NAME.to_owned() });
                }
            }
        }
    }

    /// Looks at what was told, or changes it.
    pub(super) fn journal<T>(&self, look: impl FnOnce(&mut Journal) -> T) -> T {
        look(&mut self.lock().journal)
    }

    /// Ends the present one, and lets no other follow.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.over = true;
        state.life = None;
        state.journal = Journal::default();
        self.changed.notify_all();
    }

    /// Waits until one that has ended was followed by another.
    fn next<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let ended = state.number;
        while state.number == ended && !state.over {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever panics in a request has left the journal as it was.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of the keeper.
    fn follow(&self, ends: &Receiver<u64>) {
        for number in ends {
            let mut state = self.pause(self.lock());
            if state.over {
                return;
            }
            if number != state.number {
                continue;
            }
            if let Err(reason) = self.follow_up(&mut state) {
                tracing::error!(reason, "no page server any more");
                state.over = true;
                state.journal = Journal::default();
                drop(state);
                self.layers.give_up();
                self.changed.notify_all();
                return self.tell(News::Closed);
            }
            self.changed.notify_all();
        }
    }

    /// Waits before the next attempt if those before could not take over.
    fn pause<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let Some(doublings) = state.failed.checked_sub(1) else { return state };
        let pause = TAKE_OVER_AGAIN * (1 << doublings.min(DOUBLINGS_MAX));
        let waited = self.changed.wait_timeout_while(state, pause, |state| !state.over);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Starts a new one and tells it everything. If that one ends too, the
    /// keeper hears of it. The error is why there is no other attempt.
    fn follow_up(&self, state: &mut State) -> Result<(), String> {
        let begun = Instant::now();
        let (status, served) = state.life.take().map_or((None, None), Life::bury);
        state.end = status.or(state.end);
        let how = manner(status);
        if state.ends.is_too_many(begun, status, served) {
            return Err(format!("{NAME} {how}, once too often"));
        }
        while let Err(error) = self.start(state) {
            if state.ends.is_too_many(Instant::now(), None, None) {
                return Err(format!("{NAME} {how}, and another one cannot be started: {error}"));
            }
            std::thread::sleep(START_AGAIN);
        }
        match self.hand_over(state) {
            Ok(inventory) => {
                state.failed = 0;
                self.takeovers.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    pid = self.pid(),
                    pools = inventory.pools,
                    machines = inventory.machines,
                    captures = inventory.captures,
                    refused = inventory.refused,
                    pools_lost = inventory.pools_lost,
                    us = begun.elapsed().as_micros(),
                    "{NAME} {how}; another one took over"
                );
            }
            Err(error) => {
                tracing::warn!(%error, "{NAME} {how}; the one that took over failed");
                state.failed = state.failed.saturating_add(1);
                // One that could not do it, but runs, is of no use.
                if let Some(life) = &mut state.life {
                    drop(life.child.kill());
                }
            }
        }
        Ok(())
    }

    fn hand_over(&self, state: &mut State) -> Result<Inventory, PeerError> {
        let State { life: Some(life), journal, .. } = state else {
            return Err(PeerError::Gone { process: NAME.to_owned() });
        };
        let mut ask = |request: &PagerRequest, descriptors: &[BorrowedFd<'_>]| match life
            .peer
            .call(request, descriptors)?
            .0
        {
            PagerReply::Done => Ok(()),
            _ => Err(life.peer.out_of_turn()),
        };
        let mut lost = |machine: MachineKey, pool: PoolId, reason: String| {
            let error = format!("{NAME} that took over cannot serve it: {reason}");
            self.tell(News::Event(PagerEvent::PageLost { machine, pool, page: u64::MAX, error }));
        };
        let inventory = journal.replay(&self.layers, &mut ask, &mut lost)?;
        life.serving = Some(Instant::now());
        Ok(inventory)
    }

    fn start(&self, state: &mut State) -> Result<(), PeerError> {
        let (mut child, channel) = self.program.start(NAME, &self.log)?;
        let number = state.number + 1;
        let peer = match Peer::new(NAME.to_owned(), channel, self.hear(number)) {
            Ok(peer) => peer,
            Err(error) => {
                end(&mut child);
                return Err(error);
            }
        };
        // It lists the pages of a machine of any size.
        peer.expect_bodies(usize::MAX);
        self.pid.store(child.id(), Ordering::Relaxed);
        // The first one has nothing to take over.
        let serving = (number == 1).then(Instant::now);
        state.number = number;
        state.life = Some(Life { peer, child, serving });
        Ok(())
    }

    /// Sorts what a life says: news of layers stay here, and its end is for
    /// the keeper.
    fn hear(&self, number: u64) -> impl FnMut(News<PagerEvent>) + Send + 'static {
        let (layers, listener) = (Arc::clone(&self.layers), Arc::clone(&self.listener));
        let ended = self.ended.clone();
        move |news| match news {
            News::Event(PagerEvent::LayerDone { layer, error }) => layers.done(layer, error),
            News::Event(_) => {
                (listener.lock().unwrap_or_else(PoisonError::into_inner))(news);
            }
            // Without a keeper nobody asks either.
            News::Closed => drop(ended.send(number)),
        }
    }

    fn tell(&self, news: News<PagerEvent>) {
        (self.listener.lock().unwrap_or_else(PoisonError::into_inner))(news);
    }
}

impl Life {
    /// Waits for its end: how it was, and how long it had served.
    fn bury(mut self) -> (Option<ExitStatus>, Option<Duration>) {
        let served = self.serving.map(|since| since.elapsed());
        // One that only closed its channel is of no use either.
        (end(&mut self.child), served)
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn deadly(ended: usize) -> PeerError {
    let reason = format!("{ended} of its processes ended over this request");
    PeerError::Refused { process: NAME.to_owned(), reason }
}

/// Kills a process and waits until it is gone.
fn end(child: &mut Child) -> Option<ExitStatus> {
    // It fails only if it has been waited for already, which is the goal.
    drop(child.kill());
    child.wait().ok()
}

impl std::fmt::Debug for Lives {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lives").field("pid", &self.pid).finish_non_exhaustive()
    }
}
