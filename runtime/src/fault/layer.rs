//! What a machine had written at one instant, as an image that others map.
//!
//! A layer is a pool over the pools that the machine itself maps:
//!
//! ```text
//! page of the layer ── written by the machine ──> copied from it, once (see `capture`)
//!                   ├─ freed by its guest ──────> zeros
//!                   └─ neither: a gap ──────────> from the pool below that has it
//! ```
//!
//! Gaps exist because machines map layers in few, long pieces. A gap looks up
//! the pool that really has the page, however many layers lie between, in one
//! loop: nothing is copied from layer to layer.
//!
//! Invariant: what a layer shows of a page is what its machine showed at the
//! instant of the freeze.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::machine::Machine;
use super::pool::Pool;
use super::record::LayerRecord;
use super::source::{Extent, Fetched, FrameKey, Page, PageSource, SourceError};
use crate::pages::PageSet;
use crate::protocol::{PAGE_SIZE, PageRun};

/// The pages that the machine had written.
#[derive(Debug)]
struct Frozen {
    set: PageSet,
    runs: Vec<PageRun>,
}

/// Where the pages of a layer come from.
#[derive(Debug)]
pub(super) struct LayerSource {
    len: u64,
    below: Vec<(PageRun, Arc<Pool>)>,
    frozen: OnceLock<Frozen>,
    /// Pages that are zero unless they are frozen.
    freed: OnceLock<PageSet>,
    /// The machine, for as long as pages are to be copied from it.
    machine: Mutex<Option<Arc<Machine>>>,
    /// Why pages are lost, if they are.
    lost: OnceLock<String>,
    record: LayerRecord,
}

impl LayerSource {
    /// A layer for this machine, not frozen yet.
    pub(super) fn of(machine: &Arc<Machine>, memory: Range<u64>) -> io::Result<Self> {
        Ok(Self {
            len: memory.end - memory.start,
            below: machine.memory_pools(),
            frozen: OnceLock::new(),
            freed: OnceLock::new(),
            machine: Mutex::new(Some(Arc::clone(machine))),
            lost: OnceLock::new(),
            record: LayerRecord::new()?,
        })
    }

    /// The layer of a former page server, without its machine.
    pub(super) fn adopt(
        len: u64,
        below: Vec<(PageRun, Arc<Pool>)>,
        record: LayerRecord,
        frozen: bool,
    ) -> io::Result<Self> {
        let (machine, lost) = (Mutex::default(), OnceLock::new());
        let (frozen_pages, freed) = (OnceLock::new(), OnceLock::new());
        let layer = Self { len, below, frozen: frozen_pages, freed, machine, lost, record };
        if frozen {
            let set = layer.record.pages(len / PAGE_SIZE)?;
            let runs = set.runs();
            let _first = layer.frozen.set(Frozen { set, runs });
        }
        if layer.record.has_loss()? {
            layer.lose("it could not be copied".to_owned());
        }
        Ok(layer)
    }

    /// Gives it the machine that it is to be copied from.
    pub(super) fn go_on_with(&self, machine: &Arc<Machine>) {
        *self.parent() = Some(Arc::clone(machine));
    }

    /// What the next page server must know.
    pub(super) fn record(&self) -> &LayerRecord {
        &self.record
    }

    /// Says which pages belong to it; false if that was said before.
    pub(super) fn freeze(&self, runs: Vec<PageRun>) -> io::Result<bool> {
        let set = PageSet::of(&runs, self.len / PAGE_SIZE);
        self.record.note(&set)?;
        Ok(self.frozen.set(Frozen { set, runs }).is_ok())
    }

    /// Whether it was said which pages belong to it.
    pub(super) fn is_frozen(&self) -> bool {
        self.frozen.get().is_some()
    }

    /// Says which pages the machine had freed. The first time counts.
    pub(super) fn clear(&self, freed: &[PageRun]) {
        let _known = self.freed.set(PageSet::of(freed, self.len / PAGE_SIZE));
    }

    /// Whether a page is zero, whatever is below.
    fn is_cleared(&self, page: u64) -> bool {
        !self.has(page) && self.freed.get().is_some_and(|freed| freed.contains(page))
    }

    /// The pages that belong to it.
    pub(super) fn runs(&self) -> &[PageRun] {
        self.frozen.get().map_or(&[], |frozen| &frozen.runs)
    }

    /// Whether a page belongs to it, and not to a pool below.
    pub(super) fn has(&self, page: u64) -> bool {
        self.frozen.get().is_some_and(|frozen| frozen.set.contains(page))
    }

    /// The machine, until all is copied.
    pub(super) fn machine(&self) -> Option<Arc<Machine>> {
        self.parent().clone()
    }

    /// Says that what is not copied by now is lost.
    pub(super) fn lose(&self, reason: String) {
        if let Err(error) = self.record.note_loss() {
            tracing::error!(%error, "a page server that comes next will not know of a loss");
        }
        // The first reason is the one to know.
        let _known = self.lost.set(reason);
    }

    /// Why pages are lost, if they are.
    pub(super) fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    /// Lets go of the machine.
    pub(super) fn finish(&self) {
        *self.parent() = None;
    }

    fn parent(&self) -> MutexGuard<'_, Option<Arc<Machine>>> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pool below that has a page; none if it is zero.
    fn owner(&self, page: u64) -> Option<&Pool> {
        let mut layer = self;
        loop {
            if layer.is_cleared(page) {
                return None;
            }
            let pool = layer.below(page)?;
            match pool.layer() {
                Some(next) if !next.has(page) => layer = next,
                _ => return Some(pool),
            }
        }
    }

    fn below(&self, page: u64) -> Option<&Pool> {
        let behind = self.below.partition_point(|(run, _)| run.first <= page);
        let (run, pool) = self.below.get(behind.checked_sub(1)?)?;
        (page - run.first < run.count).then_some(pool)
    }

    fn copy(&self, page: u64) -> Result<(), SourceError> {
        match (self.lost(), self.machine()) {
            (None, Some(machine)) => machine.settle(PageRun { first: page, count: 1 }),
            // Then it is there, or lost.
            (None, None) => {}
            (Some(reason), _) => {
                return Err(SourceError::Layer { page, reason: reason.to_owned() });
            }
        }
        Ok(())
    }
}

impl PageSource for LayerSource {
    fn image_len(&self) -> u64 {
        self.len
    }

    fn extent(&self, page: u64) -> Extent {
        // Each page is a frame of its own.
        let own = Extent::Stored(FrameKey { pack: u64::MAX, offset: page });
        if self.has(page) {
            return own;
        }
        match self.owner(page) {
            Some(pool) if pool.is_resident(page) => own,
            Some(pool) if pool.extent(page) != Extent::Zero => own,
            _ => Extent::Zero,
        }
    }

    fn fetch(&self, page: u64, sink: &mut dyn FnMut(u64, &Page)) -> Result<Fetched, SourceError> {
        if self.has(page) {
            self.copy(page)?;
            return Ok(Fetched::default());
        }
        let mut bytes = [0; 4096];
        if let Some(pool) = self.owner(page) {
            pool.copy_out(page, &mut bytes)?;
        }
        sink(page, &bytes);
        Ok(Fetched::default())
    }
}
