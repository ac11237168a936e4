//! Where all bytes of a store are.

use serde::{Deserialize, Serialize};

use super::table::Table;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::ledger::Ledger;
use crate::ledger::share::split_span;
use crate::pack::{FrameKind, FrameSpan};
use crate::units::to_usize;

/// The stored bytes of a store. `pages`, `metadata`, `tables` and `root_log`
/// add up to `stored`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreBill {
    /// Plaintext bytes of the chunks that a listed snapshot reaches.
    pub referenced_bytes: u64,
    /// Files of all packs, and the root log.
    pub stored_bytes: u64,
    /// Frames of pages and of chunks of streams.
    pub page_bytes: u64,
    /// Frames of nodes, roots, records and events.
    pub metadata_bytes: u64,
    /// Headers, tables and footers of packs.
    pub table_bytes: u64,
    /// The root log.
    pub root_log_bytes: u64,
    /// Bytes of frames that no listed snapshot needs, or that are kept twice.
    pub dead_bytes: u64,
    /// Of these, bytes that are needed but also lie in a younger pack, where
    /// they are read: a collection gathered what is read together, and the
    /// rest of their packs still lives.
    pub kept_twice_bytes: u64,
    /// Packs of which no listed snapshot needs anything.
    pub dead_packs: u64,
    /// Their length.
    pub dead_pack_bytes: u64,
}

pub(super) fn totals(depot: &Depot, table: &Table, log_len: u64) -> Result<StoreBill, StoreError> {
    let mut bill =
        StoreBill { root_log_bytes: log_len, stored_bytes: log_len, ..StoreBill::default() };
    for (pack, summary) in depot.packs() {
        bill.stored_bytes += summary.file_len;
        let mut frames = 0;
        for span in &depot.directory(pack)?.frames {
            let len = u64::from(span.len);
            frames += len;
            bill.kept_twice_bytes += kept_twice(depot, table, pack, span)?;
            match span.kind {
                FrameKind::Pages | FrameKind::Pieces => bill.page_bytes += len,
                FrameKind::Objects | FrameKind::Catalog => bill.metadata_bytes += len,
            }
        }
        bill.table_bytes += summary.file_len.saturating_sub(frames);
        if !table.packs.contains_key(&pack) {
            bill.dead_packs += 1;
            bill.dead_pack_bytes += summary.file_len;
        }
    }
    // Shares are counted where an object is found.
    let needed: u64 = table.rows.values().map(|row| u64::from(row.share.bytes)).sum();
    bill.dead_bytes = (bill.page_bytes + bill.metadata_bytes).saturating_sub(needed);
    bill.referenced_bytes = table.rows.values().map(|row| u64::from(row.chunk_len)).sum();
    Ok(bill)
}

/// Stored bytes of needed objects of a frame that are found elsewhere.
fn kept_twice(
    depot: &Depot,
    table: &Table,
    pack: PackId,
    span: &FrameSpan,
) -> Result<u64, StoreError> {
    let first = to_usize(u64::from(span.first.0));
    let directory = depot.directory(pack)?;
    let keys = &directory.keys[first..first + to_usize(u64::from(span.count))];
    let is_copy = |key: &ObjectKey| table.rows.get(key).is_some_and(|row| row.share.pack != pack);
    let copies: Vec<bool> = keys.iter().map(is_copy).collect();
    if !copies.contains(&true) {
        return Ok(0);
    }
    let shares = split_span(depot, pack, span)?;
    let chosen = shares.iter().zip(&copies).filter(|(_, is_copy)| **is_copy);
    Ok(chosen.map(|(bytes, _)| u64::from(*bytes)).sum())
}

/// The same out of the ledger: what came and went since it was asked last is
/// all that is read.
pub(crate) fn of_ledger(depot: &Depot, ledger: &Ledger<'_>, log_len: u64) -> StoreBill {
    let mut bill =
        StoreBill { root_log_bytes: log_len, stored_bytes: log_len, ..StoreBill::default() };
    let known = depot.packs().into_iter();
    for (row, summary) in known.filter_map(|(pack, at)| Some((ledger.packs().get(&pack)?, at))) {
        let frames = row.live_stored_bytes + row.dead_stored_bytes;
        bill.stored_bytes += summary.file_len;
        bill.referenced_bytes += row.live_chunk_bytes;
        bill.page_bytes += row.page_bytes;
        bill.metadata_bytes += frames - row.page_bytes;
        bill.table_bytes += summary.file_len.saturating_sub(frames);
        bill.dead_bytes += row.dead_stored_bytes;
        bill.kept_twice_bytes += row.twice_stored_bytes;
        if row.live_objects == 0 {
            bill.dead_packs += 1;
            bill.dead_pack_bytes += summary.file_len;
        }
    }
    bill
}
