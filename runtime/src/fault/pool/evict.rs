//! Dropping pages that can be had from the store again.
//!
//! A page is dropped by a hole in the pool's file. It goes from every machine
//! that maps it; what a machine has written is its own copy and stays. The
//! next touch is a fault like the first one.
//!
//! Pages go in blocks, and a hand goes round over the blocks: one that was
//! filled just now stays, so that whoever waited gets on, and one that had to
//! be filled again after it was dropped is passed over a few times.
//!
//! Invariant: whoever installs a page holds `changing` for reading from before
//! the kernel has it until its bit is set, and whoever drops pages holds it
//! for writing from before their bits are cleared until the kernel has let
//! them go. So a bit never stands for a page that is not there.

use std::io;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::Pool;
use crate::fault::source::{Page, SourceError};
use crate::protocol::PAGE_SIZE;

/// Pages of a block: those of a word of the bitmap.
const BLOCK: u64 = 64;

/// How often the hand passes over a block that was missed.
const PASSES: u8 = 3;

/// What is known of the blocks of a pool.
#[derive(Debug)]
pub(super) struct Ages {
    begun: Instant,
    blocks: Box<[Age]>,
    hand: AtomicUsize,
    /// When any block was filled last.
    newest_ms: AtomicU64,
}

#[derive(Debug, Default)]
struct Age {
    /// When it was filled last, since the pool was made.
    filled_ms: AtomicU64,
    /// Whether pages of it were dropped, and none came back since.
    dropped: AtomicBool,
    /// How often it is still passed over.
    passes: AtomicU8,
}

impl Ages {
    pub(super) fn new(blocks: usize) -> Self {
        Self {
            begun: Instant::now(),
            blocks: (0..blocks).map(|_| Age::default()).collect(),
            hand: AtomicUsize::new(0),
            newest_ms: AtomicU64::new(0),
        }
    }

    /// A page of a block has come.
    pub(super) fn fill(&self, block: usize) {
        let now = self.now_ms();
        let age = &self.blocks[block];
        age.filled_ms.store(now, Ordering::Relaxed);
        self.newest_ms.store(now, Ordering::Relaxed);
        if age.dropped.swap(false, Ordering::Relaxed) {
            age.passes.store(PASSES, Ordering::Relaxed);
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether the hand takes a block that it has come to.
    fn takes(&self, block: usize, young_ms: u64) -> bool {
        let age = &self.blocks[block];
        let since = self.now_ms().saturating_sub(age.filled_ms.load(Ordering::Relaxed));
        if since < young_ms {
            return false;
        }
        let pass = |passes: u8| passes.checked_sub(1);
        age.passes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, pass).is_err()
    }
}

impl Pool {
    /// Drops pages until so many are gone or none is left that may go: what
    /// was filled within `young` stays, and so does every page that the
    /// store may lack. Returns how many went.
    pub(in crate::fault) fn evict(&self, pages: u64, young: Duration) -> io::Result<u64> {
        if self.layer.is_some() {
            return Ok(0);
        }
        let young_ms = u64::try_from(young.as_millis()).unwrap_or(u64::MAX);
        let blocks = self.resident.len();
        let mut gone = 0;
        for _ in 0..blocks * (usize::from(PASSES) + 1) {
            if gone >= pages {
                break;
            }
            let block = self.ages.hand.fetch_add(1, Ordering::Relaxed) % blocks;
            if self.resident[block].load(Ordering::Relaxed) != 0 && self.ages.takes(block, young_ms)
            {
                gone += self.drop_block(block)?;
            }
        }
        Ok(gone)
    }

    fn drop_block(&self, block: usize) -> io::Result<u64> {
        let _alone = self.changing.write().unwrap_or_else(PoisonError::into_inner);
        let bits = self.resident[block].swap(0, Ordering::AcqRel);
        let count = u64::from(bits.count_ones());
        self.ages.blocks[block].dropped.store(true, Ordering::Relaxed);
        self.counters.dropping.fetch_add(count, Ordering::SeqCst);
        let first = block as u64 * BLOCK;
        let dropped = self.file.drop_pages(first, BLOCK.min(self.pages - first));
        match dropped {
            Ok(()) => {
                self.counters.dropped.fetch_add(count, Ordering::SeqCst);
                Ok(count)
            }
            // Nothing went: all is there as before.
            Err(error) => {
                self.resident[block].fetch_or(bits, Ordering::AcqRel);
                self.counters.dropping.fetch_sub(count, Ordering::SeqCst);
                Err(error)
            }
        }
    }

    /// The bytes of a page, fetched if it is not there.
    pub(in crate::fault) fn copy_out(
        &self,
        page: u64,
        bytes: &mut Page,
    ) -> Result<(), SourceError> {
        loop {
            self.pull(page)?;
            let _kept = self.changing.read().unwrap_or_else(PoisonError::into_inner);
            // It may have gone again already.
            if self.is_resident(page) {
                return Ok(self.read(page, bytes)?);
            }
        }
    }

    /// Pages that it holds.
    pub(in crate::fault) fn resident_pages(&self) -> u64 {
        let dropped = self.counters.dropped.load(Ordering::SeqCst);
        self.counters.installed.load(Ordering::SeqCst).saturating_sub(dropped)
    }

    /// How long nothing has been put into it.
    pub(in crate::fault) fn idle(&self) -> Duration {
        let newest = Duration::from_millis(self.ages.newest_ms.load(Ordering::Relaxed));
        self.ages.begun.elapsed().saturating_sub(newest)
    }
}

const _: () = assert!(PAGE_SIZE == 4096 && BLOCK == u64::BITS as u64);
