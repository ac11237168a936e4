//! What lives in a pack, in bytes.

use super::share::split_span;
use super::{Ledger, PackRow};
use crate::error::StoreError;
use crate::id::PackId;
use crate::pack::EntryNo;
use crate::units::{to_u64, to_usize};

impl Ledger<'_> {
    /// Measures a pack by its bits. Only frames of nodes and records of which
    /// a part lives are read.
    pub(super) fn measure(&mut self, pack: PackId) -> Result<PackRow, StoreError> {
        let bits = self.bits(pack)?.clone();
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
            let live_bytes = match (alive, dead) {
                (0, _) => 0,
                (_, 0) => u64::from(span.len),
                _ => {
                    let shares = split_span(self.depot, pack, span)?;
                    let living = shares.iter().zip(&live).filter(|(_, is_live)| **is_live);
                    living.map(|(bytes, _)| u64::from(*bytes)).sum()
                }
            };
            row.live_stored_bytes += live_bytes;
            row.dead_stored_bytes += u64::from(span.len) - live_bytes;
        }
        Ok(row)
    }
}
