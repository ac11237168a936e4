//! Where all bytes of a store are.

use serde::{Deserialize, Serialize};

use super::table::Table;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::pack::FrameKind;

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
    /// Bytes of frames that no listed snapshot needs.
    pub dead_bytes: u64,
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
    let needed: u64 = table.rows.values().map(|row| u64::from(row.share.bytes)).sum();
    bill.dead_bytes = (bill.page_bytes + bill.metadata_bytes).saturating_sub(needed);
    bill.referenced_bytes = table.rows.values().map(|row| u64::from(row.chunk_len)).sum();
    Ok(bill)
}
