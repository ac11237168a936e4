//! Fetching what nobody waits for yet.
//!
//! Whoever prefetches claims a frame as a fault does, only without a waiter,
//! so each frame is fetched by one thread, and a fault that comes meanwhile
//! waits for that one frame and for nothing else that is being prefetched.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use coppice_engine::ReadAhead;

use super::{Machine, Pool, Settled};
use crate::fault::source::{Extent, FrameKey, SourceError};

impl Pool {
    /// What has to be read so that a page becomes resident.
    pub(in crate::fault) fn lacks(&self, page: u64) -> Option<Extent> {
        if page >= self.pages || self.is_resident(page) {
            return None;
        }
        Some(self.source.extent(page))
    }

    /// Reads what these pages will be fetched from.
    pub(in crate::fault) fn read_ahead(&self, pages: &[u64]) -> ReadAhead {
        self.source.read_ahead(pages)
    }

    /// Makes a page resident that nobody waits for. Returns those who wait by
    /// now, if somebody is at it none. Whatever fails is left to whoever
    /// really needs the page.
    pub(in crate::fault) fn prefetch(
        &self,
        page: u64,
        ahead: &ReadAhead,
        for_machine: &Machine,
    ) -> Option<(FrameKey, Settled)> {
        match self.lacks(page)? {
            Extent::Zero => {
                // It is asked for again if this failed.
                drop(self.install_zeros(page, Some(for_machine)));
                None
            }
            Extent::Stored(frame) => {
                if !self.claim(frame, page) {
                    return None;
                }
                let fetch = || self.fetch_with(ahead, frame, page, Some(for_machine));
                let fetched: Result<(), SourceError> = catch_unwind(AssertUnwindSafe(fetch))
                    .unwrap_or(Err(SourceError::NotDelivered(page)));
                if fetched.is_ok() {
                    self.counters.prefetched.fetch_add(1, Ordering::Relaxed);
                }
                Some((frame, self.settle(frame, None)))
            }
        }
    }

    /// Takes a frame, unless somebody fetches it or the page is there.
    fn claim(&self, frame: FrameKey, page: u64) -> bool {
        let mut pending = self.pending();
        // Whoever fetched it marked it before leaving the table.
        if self.is_resident(page) || pending.contains_key(&frame) {
            return false;
        }
        pending.insert(frame, Vec::new());
        true
    }
}
