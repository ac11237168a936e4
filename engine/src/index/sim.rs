//! A simulated index, which forgets a suffix of what was done to it.
//!
//! It keeps what the index on disk promises and no more: changes come back in
//! order, each whole or not at all; what was flushed comes back certainly, of
//! the rest as much as happened to be written out. After a change that failed
//! the index goes back to what was flushed, and packs are published again: see
//! the index on disk.

use std::sync::{Arc, Mutex};

use super::rows::{RowChange, RowKey};
use super::{Index, MemIndex, PackSummary, Place};
use crate::env::lock;
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::pack::DurablePack;
use crate::units::{to_u64, to_usize};

/// The index. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub struct SimIndex {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    now: MemIndex,
    /// Everything that was done, oldest first.
    steps: Vec<Step>,
    /// So many of the steps are flushed.
    durable: usize,
    /// How many steps were tried.
    tried: u64,
    /// This step fails, once, with this error number.
    failing: Option<(u64, i32)>,
    /// A step failed, so it goes back before the next one.
    is_stuck: bool,
    generation: u64,
}

#[derive(Debug, Clone)]
enum Step {
    Publish(DurablePack),
    Retire(PackId, Vec<(ObjectKey, Option<Place>)>),
    Clear,
    Distrust(Vec<ObjectKey>),
    Hints(Vec<(ObjectKey, Option<Vec<u8>>)>),
    ClearHints,
    Rows(Vec<RowChange>),
}

impl Step {
    fn apply(&self, index: &MemIndex) -> Result<(), StoreError> {
        match self {
            Self::Publish(pack) => index.publish(pack),
            Self::Retire(pack, moves) => index.retire(*pack, moves),
            Self::Clear => index.clear(),
            Self::Distrust(keys) => index.distrust(keys),
            Self::Hints(hints) => index.write_hints(hints),
            Self::ClearHints => index.clear_hints(),
            Self::Rows(rows) => index.put_rows(0, rows),
        }
    }

    /// Whether it comes back only when it was flushed.
    fn is_flushed(&self) -> bool {
        matches!(self, Self::Retire(..) | Self::Clear | Self::Distrust(_) | Self::ClearHints)
    }
}

impl State {
    /// Back to what was flushed, and again all packs since.
    fn go_back(&mut self) -> Result<(), StoreError> {
        let lost = self.steps.split_off(self.durable);
        self.now = replayed(&self.steps)?;
        self.generation += 1;
        self.is_stuck = false;
        for step in lost.into_iter().filter(|step| matches!(step, Step::Publish(_))) {
            step.apply(&self.now)?;
            self.steps.push(step);
        }
        Ok(())
    }
}

fn replayed(steps: &[Step]) -> Result<MemIndex, StoreError> {
    let index = MemIndex::default();
    steps.iter().try_for_each(|step| step.apply(&index))?;
    Ok(index)
}

impl SimIndex {
    /// An empty index.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many changes were tried so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        lock(&self.state).tried
    }

    /// Lets the change of this number fail once with an error number; they are
    /// counted from zero.
    pub fn fail_step(&self, failing: Option<(u64, i32)>) {
        lock(&self.state).failing = failing;
    }

    /// What may be left after the power went.
    #[must_use]
    pub fn after_power_cut(&self, seed: u64) -> Self {
        let state = lock(&self.state);
        let unflushed = to_u64(state.steps.len() - state.durable);
        // Also both ends: all of it, and nothing of it.
        let kept = match seed % 4 {
            0 => 0,
            1 => unflushed,
            _ => seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (unflushed + 1),
        };
        let steps = state.steps[..state.durable + to_usize(kept)].to_vec();
        let now = replayed(&steps).expect("an index in memory does not fail");
        let durable = steps.len();
        let left = State { now, steps, durable, ..State::default() };
        Self { state: Arc::new(Mutex::new(left)) }
    }

    fn step(&self, step: Step) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        if state.is_stuck {
            state.go_back()?;
        }
        let number = state.tried;
        state.tried += 1;
        if let Some((failing, errno)) = state.failing
            && failing == number
        {
            state.is_stuck = true;
            let source = std::io::Error::from_raw_os_error(errno);
            return Err(StoreError::Io { op: "write", path: "index".to_owned(), source });
        }
        step.apply(&state.now)?;
        let flushed = step.is_flushed();
        state.steps.push(step);
        if flushed {
            state.durable = state.steps.len();
        }
        Ok(())
    }
}

impl Index for SimIndex {
    fn get_many(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Place>>, StoreError> {
        lock(&self.state).now.get_many(keys)
    }

    fn publish(&self, pack: &DurablePack) -> Result<(), StoreError> {
        self.step(Step::Publish(pack.clone()))
    }

    fn publish_new(&self, pack: &DurablePack, generation: u64) -> Result<(), StoreError> {
        let state = lock(&self.state);
        let is_new =
            state.is_stuck || state.generation != generation || state.now.has_none_of(pack);
        assert!(is_new, "{} has what the index has already", pack.pack);
        drop(state);
        self.publish(pack)
    }

    fn retire(&self, pack: PackId, moves: &[(ObjectKey, Option<Place>)]) -> Result<(), StoreError> {
        self.step(Step::Retire(pack, moves.to_vec()))
    }

    fn packs(&self) -> Result<Vec<(PackId, PackSummary)>, StoreError> {
        lock(&self.state).now.packs()
    }

    fn clear(&self) -> Result<(), StoreError> {
        self.step(Step::Clear)
    }

    fn for_each(
        &self,
        visit: &mut dyn FnMut(ObjectKey, Place) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        lock(&self.state).now.for_each(visit)
    }

    fn distrust(&self, keys: &[ObjectKey]) -> Result<(), StoreError> {
        self.step(Step::Distrust(keys.to_vec()))
    }

    fn hints(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        lock(&self.state).now.hints(keys)
    }

    fn write_hints(&self, hints: &[(ObjectKey, Option<Vec<u8>>)]) -> Result<(), StoreError> {
        self.step(Step::Hints(hints.to_vec()))
    }

    fn clear_hints(&self) -> Result<(), StoreError> {
        self.step(Step::ClearHints)
    }

    fn hint_totals(&self) -> Result<(u64, u64), StoreError> {
        lock(&self.state).now.hint_totals()
    }

    fn distrusted(&self) -> Result<Vec<ObjectKey>, StoreError> {
        lock(&self.state).now.distrusted()
    }

    fn rows(&self, keys: &[RowKey]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        lock(&self.state).now.rows(keys)
    }

    fn rows_behind(
        &self,
        prefix: &[u8],
        after: &[u8],
        limit: usize,
    ) -> Result<Vec<(RowKey, Vec<u8>)>, StoreError> {
        lock(&self.state).now.rows_behind(prefix, after, limit)
    }

    fn put_rows(&self, generation: u64, rows: &[RowChange]) -> Result<(), StoreError> {
        {
            let mut state = lock(&self.state);
            if state.is_stuck {
                state.go_back()?;
            }
            if state.generation != generation {
                return Err(StoreError::Ledger);
            }
        }
        self.step(Step::Rows(rows.to_vec()))
    }

    fn generation(&self) -> u64 {
        lock(&self.state).generation
    }
}
