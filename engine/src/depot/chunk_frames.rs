//! Decoded frames of chunks, within a budget of bytes. A frame that several
//! threads want at once is read and decompressed by the first of them, while
//! the others wait for it.
//!
//! Packs never change and their ids are never used twice, so what is kept
//! stays true. Pages in it were not verified: whoever takes one does that.
//! Whoever reads a frame waits for nobody meanwhile, so that nobody waits for
//! ever; no lock is held across the reading.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::cache::Cache;
use crate::env::lock;
use crate::id::PackId;
use crate::pack::Frame;

/// A pack and an offset in it.
pub(crate) type FrameKey = (PackId, u64);

/// A frame that is being read.
#[derive(Debug, Default)]
struct Flight {
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
}

#[derive(Debug, Clone)]
enum Outcome {
    Read(Arc<Frame>),
    /// Each who waited tries for itself, to be told why.
    Failed,
}

/// The frames that are kept and those that are being read.
#[derive(Debug)]
pub(crate) struct ChunkFrames {
    state: Mutex<State>,
    decoded: AtomicU64,
    shared: AtomicU64,
}

#[derive(Debug)]
struct State {
    kept: Cache<FrameKey, Arc<Frame>>,
    flights: HashMap<FrameKey, Arc<Flight>>,
}

enum Found {
    Kept(Arc<Frame>),
    InFlight(Arc<Flight>),
    Mine(Arc<Flight>),
}

impl ChunkFrames {
    /// Keeps frames of up to so many bytes of plaintext.
    pub(crate) fn new(len_max: usize) -> Self {
        let state = State { kept: Cache::new(len_max), flights: HashMap::new() };
        Self { state: Mutex::new(state), decoded: AtomicU64::new(0), shared: AtomicU64::new(0) }
    }

    /// Changes the budget.
    pub(crate) fn set_budget(&self, len_max: usize) {
        lock(&self.state).kept.set_weight_max(len_max);
    }

    /// How many frames were decoded, and how often one was there already or
    /// on its way.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.decoded.load(Ordering::Relaxed), self.shared.load(Ordering::Relaxed))
    }

    /// Forgets what is kept.
    pub(crate) fn clear(&self) {
        lock(&self.state).kept.clear();
    }

    /// A frame, if it is kept.
    pub(crate) fn kept(&self, key: FrameKey) -> Option<Arc<Frame>> {
        lock(&self.state).kept.get(&key)
    }

    /// A frame; `read` is called unless it is kept or on its way.
    pub(crate) fn get<E>(
        &self,
        key: FrameKey,
        read: impl FnOnce() -> Result<Frame, E>,
    ) -> Result<Arc<Frame>, E> {
        loop {
            match self.find(key) {
                Found::Kept(frame) => {
                    self.shared.fetch_add(1, Ordering::Relaxed);
                    return Ok(frame);
                }
                Found::InFlight(flight) => {
                    if let Outcome::Read(frame) = flight.wait() {
                        self.shared.fetch_add(1, Ordering::Relaxed);
                        return Ok(frame);
                    }
                }
                Found::Mine(flight) => {
                    let mut landing = Landing { frames: self, key, flight, frame: None };
                    let frame = Arc::new(read()?);
                    self.decoded.fetch_add(1, Ordering::Relaxed);
                    landing.frame = Some(Arc::clone(&frame));
                    return Ok(frame);
                }
            }
        }
    }

    fn find(&self, key: FrameKey) -> Found {
        let mut state = lock(&self.state);
        if let Some(frame) = state.kept.get(&key) {
            return Found::Kept(frame);
        }
        if let Some(flight) = state.flights.get(&key) {
            return Found::InFlight(Arc::clone(flight));
        }
        let flight = Arc::new(Flight::default());
        state.flights.insert(key, Arc::clone(&flight));
        Found::Mine(flight)
    }
}

impl Flight {
    fn wait(&self) -> Outcome {
        let mut outcome = lock(&self.outcome);
        loop {
            match &*outcome {
                Some(outcome) => return outcome.clone(),
                None => {
                    let waited = self.landed.wait(outcome);
                    outcome = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// Ends a flight, also if reading failed or panicked.
struct Landing<'f> {
    frames: &'f ChunkFrames,
    key: FrameKey,
    flight: Arc<Flight>,
    frame: Option<Arc<Frame>>,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.frames.state);
        state.flights.remove(&self.key);
        let outcome = match self.frame.take() {
            Some(frame) => {
                state.kept.put(self.key, Arc::clone(&frame), frame.plain.len());
                Outcome::Read(frame)
            }
            None => Outcome::Failed,
        };
        drop(state);
        *lock(&self.flight.outcome) = Some(outcome);
        self.flight.landed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::pack::FrameKind;

    fn frame(len: usize) -> Frame {
        Frame::new(FrameKind::Pages, 1, vec![7; len])
    }

    const KEY: FrameKey = (PackId(1), 16);

    /// Waits until so many others wait for the flight of the key.
    fn until_joined(frames: &ChunkFrames, others: usize) {
        loop {
            let flight = lock(&frames.state).flights.get(&KEY).map(Arc::strong_count);
            // The table, the reader and those who wait.
            if flight == Some(2 + others) {
                return;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn many_readers_of_one_frame_cause_one_reading() {
        let frames = ChunkFrames::new(1 << 20);
        let (readings, barrier) = (AtomicU64::new(0), Barrier::new(8));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    barrier.wait();
                    let read = || {
                        readings.fetch_add(1, Ordering::Relaxed);
                        until_joined(&frames, 7);
                        Ok::<_, ()>(frame(4096))
                    };
                    assert_eq!(frames.get(KEY, read).expect("a frame").plain.len(), 4096);
                });
            }
        });
        assert_eq!(readings.load(Ordering::Relaxed), 1);
        assert_eq!(frames.counts(), (1, 7));
    }

    #[test]
    fn a_failure_is_told_to_each_and_a_panic_keeps_nobody_waiting() {
        let frames = ChunkFrames::new(1 << 20);
        let readings = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let read = || Err(readings.fetch_add(1, Ordering::Relaxed));
                    assert!(frames.get(KEY, read).is_err());
                });
            }
        });
        assert_eq!(readings.load(Ordering::Relaxed), 4);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                let read = || -> Result<Frame, ()> {
                    until_joined(&frames, 1);
                    panic!("a bug in the reading");
                };
                frames.get(KEY, read)
            });
            let other = scope.spawn(|| {
                while lock(&frames.state).flights.is_empty() {
                    std::thread::yield_now();
                }
                frames.get(KEY, || Ok::<_, ()>(frame(10)))
            });
            assert!(first.join().is_err());
            assert!(other.join().expect("no panic").is_ok());
        });
    }

    #[test]
    fn the_budget_holds() {
        let frames = ChunkFrames::new(10_000);
        for offset in 0..10 {
            let got = frames.get((PackId(1), offset), || Ok::<_, ()>(frame(4096)));
            assert!(got.is_ok());
        }
        let kept = (0..10).filter(|offset| frames.kept((PackId(1), *offset)).is_some());
        assert_eq!(kept.collect::<Vec<_>>(), [8, 9]);
        frames.set_budget(0);
        assert!(frames.kept((PackId(1), 9)).is_none());
    }
}
