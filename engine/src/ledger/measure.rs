//! What lives in a pack, in bytes.

use super::share::split_span;
use super::{Ledger, PackRow};
use crate::error::StoreError;
use crate::id::PackId;
use crate::pack::{EntryNo, FrameSpan};
use crate::units::{to_u64, to_usize};

impl Ledger<'_> {
    /// Measures a pack by its bits. Only frames of nodes and records of which
    /// a part lives are read.
    pub(super) fn measure(&mut self, pack: PackId) -> Result<PackRow, StoreError> {
        let bits = self.bits(pack)?.clone();
        let twice = self.twice(pack)?.clone();
        let mut row = PackRow::default();
        let directory = self.depot.directory(pack)?;
        for span in &directory.frames {
            let first = to_usize(u64::from(span.first.0));
            let count = to_usize(u64::from(span.count));
            let live: Vec<bool> = (first..first + count).map(|at| bits.contains(at)).collect();
            let alive = to_u64(live.iter().filter(|is_live| **is_live).count());
            let dead = to_u64(count) - alive;
            row.live_objects += alive;
            row.dead_objects += dead;
            if span.kind.holds_chunks() {
                row.page_bytes += u64::from(span.len);
            }
            for (entry, is_live) in (span.first.0..).map(EntryNo).zip(&live) {
                let len = directory.chunk_len(span, entry);
                let sum =
                    if *is_live { &mut row.live_chunk_bytes } else { &mut row.dead_chunk_bytes };
                *sum += len;
            }
            let stored = |chosen: &[bool]| self.stored_bytes(pack, span, chosen);
            let live_bytes = stored(&live)?;
            let kept_twice: Vec<bool> =
                (first..first + count).map(|at| twice.contains(at)).collect();
            row.twice_stored_bytes += stored(&kept_twice)?;
            row.live_stored_bytes += live_bytes;
            row.dead_stored_bytes += u64::from(span.len) - live_bytes;
        }
        Ok(row)
    }

    /// Stored bytes of some objects of a frame.
    fn stored_bytes(
        &self,
        pack: PackId,
        span: &FrameSpan,
        chosen: &[bool],
    ) -> Result<u64, StoreError> {
        if !chosen.contains(&true) {
            return Ok(0);
        }
        if !chosen.contains(&false) {
            return Ok(u64::from(span.len));
        }
        let shares = split_span(self.depot, pack, span)?;
        let of_chosen = shares.iter().zip(chosen).filter(|(_, is_chosen)| **is_chosen);
        Ok(of_chosen.map(|(bytes, _)| u64::from(*bytes)).sum())
    }
}
