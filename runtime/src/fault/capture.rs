//! Capturing a machine's memory while the machine goes on.
//!
//! While the machine stands still, the pages that it has written are found
//! and write-protected, and nothing is copied. Then it goes on. A thread
//! copies the pages into a layer, and a page that the machine writes to before
//! its turn comes is copied by the worker that gets the fault:
//!
//! ```text
//! read the page -> install it in every layer that lacks it -> unprotect it, which wakes
//! ```
//!
//! Invariant: a page is unprotected only when every layer that it belongs to
//! has it, by the kernel's word (`UFFDIO_COPY` refuses a second copy). Bytes
//! that were read too late are therefore never the ones that are kept. Whoever
//! copies holds the list of captures for reading from before it looks until
//! after it has unprotected, and whoever protects holds it for writing, so a
//! capture that begins cannot lose its protection to the end of another.
//!
//! The protection and the layer outlive a page server that ends. The next one
//! opens the captures again before it answers a fault of the machine, and
//! copies what is not in their layers.

use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use super::layer::LayerSource;
use super::machine::Machine;
use super::outbox::Outbox;
use super::pool::Pool;
use crate::pages::{pieces_of, runs_of};
use crate::protocol::{PAGE_SIZE, PageRun, PagerEvent};
use crate::sys::pagemap::{Pagemap, PagemapError};
use crate::sys::remote_memory::{RemoteMemory, RemoteMemoryError};

/// Pages that the copying thread takes at once.
const BATCH: u64 = 64;

/// When the copying begins: what is left of the pause has the processors for
/// itself.
const HEAD_START: Duration = Duration::from_millis(2);

/// Why a machine cannot be captured.
#[derive(Debug, thiserror::Error)]
pub(super) enum CaptureError {
    /// Its memory lies elsewhere than it was said to.
    #[error("the machine's memory lies at {known:#x?}, not at {said:#x?}")]
    Moved {
        /// What an earlier capture was told.
        known: Range<u64>,
        /// What this one was told.
        said: Range<u64>,
    },
    /// The kernel cannot watch its memory for writes.
    #[error("the kernel refuses to watch the machine's memory for writes: {0}")]
    Watch(#[source] io::Error),
    /// Its page tables cannot be read.
    #[error(transparent)]
    Scan(#[from] PagemapError),
    /// It has written more than the caller has room for.
    #[error("the machine has written {pages} pages, more than the {pages_max} that fit")]
    TooMany {
        /// Pages that it has written.
        pages: u64,
        /// The limit.
        pages_max: u64,
    },
    /// What belongs to the layer cannot be noted.
    #[error("no memory to note which pages are captured: {0}")]
    Record(#[source] io::Error),
    /// The layer was used before.
    #[error("the layer is frozen already")]
    Again,
    /// Pages cannot be protected.
    #[error("the kernel refuses to protect the machine's pages: {0}")]
    Protect(#[source] io::Error),
    /// No thread to copy them.
    #[error("no thread to copy the machine's pages: {0}")]
    Thread(#[source] io::Error),
}

/// A machine's memory, seen from here.
#[derive(Debug)]
struct Memory {
    range: Range<u64>,
    pagemap: Pagemap,
    remote: RemoteMemory,
}

/// One capture whose pages are not all copied.
#[derive(Debug, Clone)]
struct Capture {
    pool: Arc<Pool>,
    layer: Arc<LayerSource>,
}

/// What is being captured of a machine.
#[derive(Debug, Default)]
pub(super) struct Captures {
    memory: OnceLock<Memory>,
    open: RwLock<Vec<Capture>>,
}

impl Machine {
    /// Prepares for captures. Later calls find it done.
    pub(super) fn prepare(
        &self,
        range: Range<u64>,
        pagemap: Pagemap,
        remote: RemoteMemory,
    ) -> Result<(), CaptureError> {
        if let Some(known) = self.captures.memory.get() {
            let (known, said) = (known.range.clone(), range);
            return if known == said { Ok(()) } else { Err(CaptureError::Moved { known, said }) };
        }
        let pooled = !self.memory_pools().is_empty();
        self.userfault
            .register_for_protection(range.start, range.end - range.start, pooled)
            .map_err(CaptureError::Watch)?;
        // Requests come one after the other, so nobody was faster.
        let _first = self.captures.memory.set(Memory { range, pagemap, remote });
        Ok(())
    }

    /// Where its memory lies, if it was prepared for captures.
    pub(super) fn captured_range(&self) -> Option<Range<u64>> {
        self.captures.memory.get().map(|memory| memory.range.clone())
    }

    /// Answers a write to a protected page.
    pub(super) fn release(&self, address: u64) {
        match self.captures.memory.get() {
            Some(memory) if memory.range.contains(&address) => {
                self.settle(PageRun {
                    first: (address - memory.range.start) / PAGE_SIZE,
                    count: 1,
                });
            }
            _ => self.wake(address),
        }
    }

    /// Copies pages into every layer that they belong to and that lacks them,
    /// and then lets the machine write to them.
    pub(super) fn settle(&self, run: PageRun) {
        let Some(memory) = self.captures.memory.get() else { return };
        let open = self.open_captures();
        for capture in open.iter() {
            capture.copy(memory, run);
        }
        // It fails only if the machine is gone, and then nobody waits.
        drop(self.userfault.unprotect(memory.address(run), run.count * PAGE_SIZE));
    }

    fn open_captures(&self) -> RwLockReadGuard<'_, Vec<Capture>> {
        self.captures.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Protects the pages of a capture, from now on one of those that are
    /// open.
    fn open(&self, memory: &Memory, capture: &Capture) -> io::Result<()> {
        let mut open = self.captures.open.write().unwrap_or_else(PoisonError::into_inner);
        open.push(capture.clone());
        capture
            .layer
            .runs()
            .iter()
            .try_for_each(|run| self.userfault.protect(memory.address(*run), run.count * PAGE_SIZE))
    }

    fn close(&self, capture: &Capture) {
        let mut open = self.captures.open.write().unwrap_or_else(PoisonError::into_inner);
        open.retain(|other| !Arc::ptr_eq(&other.pool, &capture.pool));
    }
}

impl Memory {
    fn address(&self, run: PageRun) -> u64 {
        self.range.start + run.first * PAGE_SIZE
    }
}

impl Capture {
    /// Copies those of the pages that the layer lacks. If that fails, the
    /// machine goes on all the same, and the layer is what suffers.
    fn copy(&self, memory: &Memory, run: PageRun) {
        let lacking = |page| self.layer.has(page) && !self.pool.is_resident(page);
        for run in runs_of(run, lacking) {
            if self.layer.lost().is_some() {
                return;
            }
            if let Err(reason) = self.copy_run(memory, run) {
                self.layer.lose(reason);
            }
        }
    }

    fn copy_run(&self, memory: &Memory, run: PageRun) -> Result<(), String> {
        let gone = |error: RemoteMemoryError| error.to_string();
        let full = |error: io::Error| format!("its layer cannot take a page: {error}");
        if run.count == 1 {
            let mut page = [0; 4096];
            memory.remote.read(memory.address(run), &mut page).map_err(gone)?;
            return self.pool.install_run(run.first, &page).map_err(full);
        }
        for piece in pieces_of(run, BATCH) {
            let mut bytes = vec![0; usize::try_from(piece.count).unwrap_or(0) * 4096];
            memory.remote.read(memory.address(piece), &mut bytes).map_err(gone)?;
            self.pool.install_run(piece.first, &bytes).map_err(full)?;
        }
        Ok(())
    }

    /// Copies everything, unprotects everything, and says so.
    fn drain(&self, machine: &Machine, outbox: &Outbox) {
        let pieces = self.layer.runs().iter().flat_map(|run| pieces_of(*run, BATCH));
        for piece in pieces {
            let mut pages = piece.first..piece.first + piece.count;
            // Whoever copied a page unprotects it.
            if !pages.all(|page| self.pool.is_resident(page)) {
                machine.settle(piece);
            }
        }
        self.end(machine, outbox);
    }

    fn end(&self, machine: &Machine, outbox: &Outbox) {
        machine.close(self);
        self.layer.finish();
        let error = self.layer.lost().map(str::to_owned);
        outbox.event(PagerEvent::LayerDone { layer: self.pool.id(), error });
    }
}

/// Captures that a former page server began.
#[derive(Debug)]
pub(super) struct Resumed(Vec<Capture>);

/// Takes up the captures of a machine whose pages are protected since, before
/// any of its faults is answered. Of a machine that is gone they are lost.
pub(super) fn take_up(
    machine: &Arc<Machine>,
    pools: &[Arc<Pool>],
    memory: Option<Result<(), CaptureError>>,
) -> Resumed {
    let mut open = machine.captures.open.write().unwrap_or_else(PoisonError::into_inner);
    for pool in pools {
        let Some(layer) = pool.layer() else { continue };
        layer.go_on_with(machine);
        if let Some(Err(error)) = &memory {
            layer.lose(error.to_string());
        }
        if layer.is_frozen() {
            open.push(Capture { pool: Arc::clone(pool), layer: Arc::clone(layer) });
        }
    }
    Resumed(open.clone())
}

/// Goes on with copying. Pages may be copied and protected still, so all are
/// unprotected.
pub(super) fn go_on(machine: &Arc<Machine>, resumed: Resumed, outbox: &Outbox) {
    for capture in resumed.0 {
        let (own, copied, said) = (Arc::clone(machine), capture.clone(), outbox.clone());
        let copier = move || {
            for run in copied.layer.runs() {
                pieces_of(*run, BATCH).for_each(|piece| own.settle(piece));
            }
            copied.end(&own, &said);
        };
        let thread = std::thread::Builder::new().name("copier".to_owned());
        if let Err(error) = thread.spawn(copier) {
            capture.layer.lose(CaptureError::Thread(error).to_string());
            capture.drain(machine, outbox);
        }
    }
}

/// Makes what a stopped machine has written belong to a layer, and begins to
/// copy it; returns how many pages that are. If it fails, the machine is as it
/// was.
pub(super) fn freeze(
    pool: &Arc<Pool>,
    pages_max: u64,
    outbox: &Outbox,
) -> Result<u64, CaptureError> {
    let layer = Arc::clone(pool.layer().ok_or(CaptureError::Again)?);
    let machine = layer.machine().ok_or(CaptureError::Again)?;
    let memory = machine.captures.memory.get().ok_or(CaptureError::Again)?;
    let runs = memory.pagemap.dirty(memory.range.clone())?;
    let pages = runs.iter().map(|run| run.count).sum();
    if pages > pages_max {
        return Err(CaptureError::TooMany { pages, pages_max });
    }
    if layer.is_frozen() || !layer.freeze(runs).map_err(CaptureError::Record)? {
        return Err(CaptureError::Again);
    }
    let capture = Capture { pool: Arc::clone(pool), layer };
    let protected = machine.open(memory, &capture).map_err(CaptureError::Protect);
    let begun = protected.and_then(|()| begin(&machine, &capture, outbox));
    if let Err(error) = begun {
        capture.layer.lose(error.to_string());
        capture.drain(&machine, outbox);
        return Err(error);
    }
    Ok(pages)
}

fn begin(machine: &Arc<Machine>, capture: &Capture, outbox: &Outbox) -> Result<(), CaptureError> {
    let (machine, capture, outbox) = (Arc::clone(machine), capture.clone(), outbox.clone());
    std::thread::Builder::new()
        .name("copier".to_owned())
        .spawn(move || {
            std::thread::sleep(HEAD_START);
            capture.drain(&machine, &outbox);
        })
        .map(drop)
        .map_err(CaptureError::Thread)
}
