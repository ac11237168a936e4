//! A page pool: the memory of one image, filled page by page.
//!
//! Invariants: a set bit means that the page is in the pool's file; a frame
//! is in the pending table exactly while one thread fetches it or a job for
//! it lies in the queue; a waiter leaves the table only to be woken or
//! poisoned. The table's lock is never held across a fetch or an ioctl.

mod claim;
mod evict;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use coppice_engine::ReadAhead;

use self::evict::Ages;
use super::layer::LayerSource;
use super::machine::{Machine, Waiter};
use super::source::{Extent, FrameKey, Page, PageSource, SourceError};
use crate::protocol::{PAGE_SIZE, PoolId, PoolStats};
use crate::sys::memfd::{HugePagesError, PoolFile, refuse_huge_pages};
use crate::sys::side::{Installed, SideMapping};

/// Why a pool cannot be made or trusted.
#[derive(Debug, thiserror::Error)]
pub(super) enum PoolError {
    /// The host would put pages into it unasked.
    #[error(transparent)]
    HugePages(#[from] HugePagesError),
    /// The kernel refused its memory or its userfaultfd.
    #[error("cannot make a page pool of {len} bytes: {source}")]
    Memory {
        /// Wanted length in bytes.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Pages are there that were never installed, so guests may have read
    /// zeros that are not in the image.
    #[error("{pool:?} holds {allocated} pages, but {installed} were installed; stop its machines")]
    Foreign {
        /// Which.
        pool: PoolId,
        /// Pages that the kernel holds.
        allocated: u64,
        /// Pages that this process installed.
        installed: u64,
    },
}

/// How much more than the page asked for is installed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    /// Pages of the same frame, at most.
    pub(super) neighbours: u64,
    /// Pages of zeros: those that lie in an aligned window of this many.
    pub(super) zero_window: u64,
}

/// Each page of a layer that is copied in vain is one that a machine holds
/// twice.
const LAYER_BUDGET: Budget = Budget { neighbours: 0, zero_window: 1 };

/// What a fault needs.
#[derive(Debug)]
pub(super) enum Arrival {
    /// Nothing: the page is there.
    Resident,
    /// A page of zeros.
    Zeros,
    /// Nothing: its frame is being fetched, and the waiter is noted.
    Joined,
    /// A fetch, by whoever noted the waiter.
    Fetch(FrameKey),
}

/// Waiters whose page has been decided.
#[derive(Debug, Default)]
pub(super) struct Settled {
    pub(super) woken: Vec<Waiter>,
    pub(super) lost: Vec<Waiter>,
    /// A page that is still waited for in the same frame.
    pub(super) next: Option<u64>,
}

#[derive(Debug, Default)]
struct Counters {
    /// Pages whose installation has begun and not failed.
    attempted: AtomicU64,
    installed: AtomicU64,
    /// Pages whose dropping has begun and not failed.
    dropping: AtomicU64,
    dropped: AtomicU64,
    stored: AtomicU64,
    zero: AtomicU64,
    frames_read: AtomicU64,
    bytes_read: AtomicU64,
    prefetched: AtomicU64,
}

/// The memory of one image.
pub(super) struct Pool {
    id: PoolId,
    source: Arc<dyn PageSource>,
    /// The source, if it is one of these.
    layer: Option<Arc<LayerSource>>,
    len: u64,
    pages: u64,
    file: PoolFile,
    side: SideMapping,
    resident: Box<[AtomicU64]>,
    /// What a bit says and what the file has change together under this.
    changing: RwLock<()>,
    ages: Ages,
    pending: Mutex<HashMap<FrameKey, Vec<Waiter>>>,
    budget: Budget,
    counters: Counters,
}

impl Pool {
    /// An empty pool.
    pub(super) fn new(
        id: PoolId,
        source: Arc<dyn PageSource>,
        budget: Budget,
    ) -> Result<Self, PoolError> {
        refuse_huge_pages()?;
        Self::over(id, source, budget, PoolFile::new)
    }

    /// A pool of a former page server, with the pages that are in it.
    pub(super) fn adopt(
        id: PoolId,
        source: Arc<dyn PageSource>,
        budget: Budget,
        memory: OwnedFd,
    ) -> Result<Self, PoolError> {
        // It has its pages already: better with some unasked than without any.
        if let Err(error) = refuse_huge_pages() {
            tracing::warn!(%error, pool = id.0, "taken over all the same");
        }
        let pool = Self::over(id, source, budget, |len| PoolFile::adopt(memory, len))?;
        pool.recount()?;
        Ok(pool)
    }

    fn over(
        id: PoolId,
        source: Arc<dyn PageSource>,
        budget: Budget,
        file: impl FnOnce(u64) -> io::Result<PoolFile>,
    ) -> Result<Self, PoolError> {
        let len = source.image_len();
        let failed = |source| PoolError::Memory { len, source };
        let pages = len.div_ceil(PAGE_SIZE).max(1);
        let words = usize::try_from(pages.div_ceil(64)).map_err(|_| failed(too_large()))?;
        let bytes = pages.checked_mul(PAGE_SIZE).ok_or_else(|| failed(too_large()))?;
        let file = file(bytes).map_err(failed)?;
        let side = SideMapping::new(&file).map_err(failed)?;
        let resident = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            id,
            source,
            layer: None,
            len,
            pages,
            file,
            side,
            resident,
            changing: RwLock::default(),
            ages: Ages::new(words),
            pending: Mutex::default(),
            budget,
            counters: Counters::default(),
        })
    }

    /// An empty pool for the pages of a machine that goes on.
    pub(super) fn of_layer(id: PoolId, layer: Arc<LayerSource>) -> Result<Self, PoolError> {
        let source = Arc::clone(&layer);
        Ok(Self { layer: Some(layer), ..Self::new(id, source, LAYER_BUDGET)? })
    }

    /// The pool of a layer of a former page server, with the pages in it.
    pub(super) fn adopt_layer(
        id: PoolId,
        layer: Arc<LayerSource>,
        memory: OwnedFd,
    ) -> Result<Self, PoolError> {
        let source = Arc::clone(&layer);
        Ok(Self { layer: Some(layer), ..Self::adopt(id, source, LAYER_BUDGET, memory)? })
    }

    /// Finds the pages that were installed in a former life: each of them is
    /// whole, by the kernel's word.
    fn recount(&self) -> Result<(), PoolError> {
        let failed = |source| PoolError::Memory { len: self.len, source };
        for run in self.file.held().map_err(failed)? {
            for page in run.first..run.first + run.count {
                let zero = self.source.extent(page) == Extent::Zero;
                let kind = if zero { &self.counters.zero } else { &self.counters.stored };
                kind.fetch_add(1, Ordering::Relaxed);
                self.mark(page);
            }
            self.counters.attempted.fetch_add(run.count, Ordering::SeqCst);
            self.counters.installed.fetch_add(run.count, Ordering::SeqCst);
        }
        Ok(())
    }

    /// What a layer of a live machine knows of its pages.
    pub(super) fn layer(&self) -> Option<&Arc<LayerSource>> {
        self.layer.as_ref()
    }

    /// What its image has at a page.
    pub(super) fn extent(&self, page: u64) -> Extent {
        self.source.extent(page)
    }

    /// Reads where this page map of its image says from now on.
    pub(super) fn renew(&self, map: File) -> Result<(), SourceError> {
        self.source.renew(map)
    }

    /// Makes a page resident, whoever needs it.
    pub(super) fn pull(&self, page: u64) -> Result<(), SourceError> {
        if self.is_resident(page) {
            return Ok(());
        }
        match self.source.extent(page) {
            Extent::Zero => self.install_zeros(page, None),
            Extent::Stored(frame) => self.fetch(frame, page, None),
        }
    }

    /// The bytes of a page that is resident.
    pub(super) fn read(&self, page: u64, bytes: &mut Page) -> io::Result<()> {
        self.file.file().read_exact_at(bytes, page * PAGE_SIZE)
    }

    /// Installs whole pages from `first` on, except those that are there.
    pub(super) fn install_run(&self, first: u64, bytes: &[u8]) -> io::Result<()> {
        let (pages, _) = bytes.as_chunks::<4096>();
        let mut done = 0;
        while done < pages.len() {
            let page = first + done as u64;
            let rest = &pages[done..];
            let kept = self.changing.read().unwrap_or_else(PoisonError::into_inner);
            self.counters.attempted.fetch_add(rest.len() as u64, Ordering::SeqCst);
            let result = self.side.install_run(page, rest.as_flattened());
            let new = *result.as_ref().unwrap_or(&0);
            self.counters.stored.fetch_add(new, Ordering::Relaxed);
            self.counters.installed.fetch_add(new, Ordering::SeqCst);
            self.counters.attempted.fetch_sub(rest.len() as u64 - new, Ordering::SeqCst);
            result?;
            if new == 0 {
                drop(kept);
                self.install(page, &rest[0], None)?;
                done += 1;
            } else {
                (page..page + new).for_each(|page| self.mark(page));
                done += usize::try_from(new).unwrap_or(usize::MAX);
            }
        }
        Ok(())
    }

    /// Its name.
    pub(super) fn id(&self) -> PoolId {
        self.id
    }

    /// Its length in whole pages.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Its memory for machines, through which nothing can be written.
    pub(super) fn read_only(&self) -> io::Result<OwnedFd> {
        self.file.read_only()
    }

    /// Its memory for the page server that takes over when this one ends.
    pub(super) fn share(&self) -> io::Result<OwnedFd> {
        self.file.share()
    }

    /// Decides what a fault needs, and notes the waiter if it has to wait.
    pub(super) fn arrive(&self, waiter: &Waiter) -> Arrival {
        if self.is_resident(waiter.page) {
            return Arrival::Resident;
        }
        let Extent::Stored(frame) = self.source.extent(waiter.page) else {
            return Arrival::Zeros;
        };
        let mut pending = self.pending();
        // Whoever fetched it marked it before leaving the table.
        if self.is_resident(waiter.page) {
            return Arrival::Resident;
        }
        if let Some(waiters) = pending.get_mut(&frame) {
            let same = |other: &Waiter| {
                other.address == waiter.address && Arc::ptr_eq(&other.machine, &waiter.machine)
            };
            // A thread that the kernel cannot put to sleep asks again and again.
            if !waiters.iter().any(same) {
                waiters.push(waiter.clone());
            }
            return Arrival::Joined;
        }
        pending.insert(frame, vec![waiter.clone()]);
        Arrival::Fetch(frame)
    }

    /// Fetches a page, installs it, wakes who waits for it, and then installs
    /// its neighbours.
    pub(super) fn fetch(
        &self,
        frame: FrameKey,
        page: u64,
        for_machine: Option<&Machine>,
    ) -> Result<(), SourceError> {
        self.fetch_with(&ReadAhead::default(), frame, page, for_machine)
    }

    fn fetch_with(
        &self,
        ahead: &ReadAhead,
        frame: FrameKey,
        page: u64,
        for_machine: Option<&Machine>,
    ) -> Result<(), SourceError> {
        let (mut failed, mut delivered) = (None, false);
        let mut neighbours = 0;
        let fetched = self.source.fetch_with(ahead, page, &mut |found, bytes| {
            if found == page {
                match self.install(found, bytes, for_machine) {
                    Ok(()) => {
                        delivered = true;
                        self.wake_page(frame, page);
                    }
                    Err(source) => failed = Some(SourceError::Install { page, source }),
                }
            } else if neighbours < self.budget.neighbours && !self.is_resident(found) {
                neighbours += 1;
                // A neighbour that does not fit is fetched when it is asked for.
                drop(self.install(found, bytes, for_machine));
            }
        })?;
        self.counters.frames_read.fetch_add(1, Ordering::Relaxed);
        self.counters.bytes_read.fetch_add(fetched.bytes_read, Ordering::Relaxed);
        match failed {
            Some(error) => Err(error),
            // A layer's own page is put there by whoever copies it.
            None if delivered || self.is_resident(page) => Ok(()),
            None => Err(SourceError::NotDelivered(page)),
        }
    }

    /// Installs a page of zeros and those around it.
    pub(super) fn install_zeros(
        &self,
        page: u64,
        for_machine: Option<&Machine>,
    ) -> Result<(), SourceError> {
        self.install_zero(page, for_machine)
            .map_err(|source| SourceError::Install { page, source })?;
        let window = self.budget.zero_window.max(1);
        let first = page / window * window;
        for other in first..(first + window).min(self.pages) {
            if !self.is_resident(other) && self.source.extent(other) == Extent::Zero {
                drop(self.install_zero(other, for_machine));
            }
        }
        Ok(())
    }

    /// Takes the waiters whose page is resident now, or is the lost one, out
    /// of the table. Unless some are left, the frame is no longer pending.
    pub(super) fn settle(&self, frame: FrameKey, lost: Option<u64>) -> Settled {
        let mut settled = Settled::default();
        let mut pending = self.pending();
        let waiters = pending.remove(&frame).unwrap_or_default();
        let mut left = Vec::new();
        for waiter in waiters {
            if self.is_resident(waiter.page) {
                settled.woken.push(waiter);
            } else if lost == Some(waiter.page) {
                settled.lost.push(waiter);
            } else {
                left.push(waiter);
            }
        }
        settled.next = left.first().map(|waiter| waiter.page);
        if !left.is_empty() {
            pending.insert(frame, left);
        }
        settled
    }

    fn wake_page(&self, frame: FrameKey, page: u64) {
        let mut woken = Vec::new();
        if let Some(waiters) = self.pending().get_mut(&frame) {
            woken.extend(waiters.extract_if(.., |waiter| waiter.page == page));
        }
        woken.iter().for_each(Waiter::wake);
    }

    fn install(&self, page: u64, bytes: &Page, for_machine: Option<&Machine>) -> io::Result<()> {
        self.put(page, &self.counters.stored, for_machine, || self.side.install(page, bytes))
    }

    fn install_zero(&self, page: u64, for_machine: Option<&Machine>) -> io::Result<()> {
        self.put(page, &self.counters.zero, for_machine, || self.side.install_zeros(page))
    }

    fn put(
        &self,
        page: u64,
        kind: &AtomicU64,
        for_machine: Option<&Machine>,
        act: impl FnOnce() -> io::Result<Installed>,
    ) -> io::Result<()> {
        let _kept = self.changing.read().unwrap_or_else(PoisonError::into_inner);
        self.counters.attempted.fetch_add(1, Ordering::SeqCst);
        let result = act();
        if let Ok(Installed::New) = result {
            kind.fetch_add(1, Ordering::Relaxed);
            if let Some(machine) = for_machine {
                machine.pages_installed.fetch_add(1, Ordering::Relaxed);
            }
            self.counters.installed.fetch_add(1, Ordering::SeqCst);
        } else {
            self.counters.attempted.fetch_sub(1, Ordering::SeqCst);
        }
        result?;
        self.mark(page);
        Ok(())
    }

    fn mark(&self, page: u64) {
        let (word, bit) = self.bit(page);
        self.resident[word].fetch_or(bit, Ordering::Release);
        self.ages.fill(word);
    }

    /// Whether a page is in its file.
    pub(super) fn is_resident(&self, page: u64) -> bool {
        let (word, bit) = self.bit(page);
        self.resident[word].load(Ordering::Acquire) & bit != 0
    }

    fn bit(&self, page: u64) -> (usize, u64) {
        assert!(page < self.pages, "page {page} is not of {:?}", self.id);
        let word = usize::try_from(page / 64).expect("the bitmap fits the address space");
        (word, 1 << (page % 64))
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<FrameKey, Vec<Waiter>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its counters, if the kernel holds just the pages that were installed.
    pub(super) fn stats(&self) -> Result<PoolStats, PoolError> {
        let counters = &self.counters;
        // Others may be installing: the truth lies between what was done
        // before the kernel was asked and what was begun when it had answered.
        let installed = counters.installed.load(Ordering::SeqCst);
        let dropped = counters.dropped.load(Ordering::SeqCst);
        let allocated = self
            .file
            .allocated_pages()
            .map_err(|source| PoolError::Memory { len: self.len, source })?;
        let attempted = counters.attempted.load(Ordering::SeqCst).max(installed);
        let dropping = counters.dropping.load(Ordering::SeqCst).max(dropped);
        let fewest = installed.saturating_sub(dropping);
        if !(fewest..=attempted.saturating_sub(dropped)).contains(&allocated) {
            return Err(PoolError::Foreign { pool: self.id, allocated, installed });
        }
        Ok(PoolStats {
            len: self.len,
            resident_pages: self.resident_pages(),
            evicted_pages: dropped,
            stored_pages: counters.stored.load(Ordering::Relaxed),
            zero_pages: counters.zero.load(Ordering::Relaxed),
            frames_read: counters.frames_read.load(Ordering::Relaxed),
            bytes_read: counters.bytes_read.load(Ordering::Relaxed),
            frames_prefetched: counters.prefetched.load(Ordering::Relaxed),
        })
    }
}

fn too_large() -> io::Error {
    io::ErrorKind::OutOfMemory.into()
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("id", &self.id).field("len", &self.len).finish_non_exhaustive()
    }
}
