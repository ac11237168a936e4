//! One qcow2 file of a chain, read forwards: what it says about the next
//! place of the disk, and the bytes there.
//!
//! Places are only asked for in ascending order, so every table and every
//! cluster is read once.

use std::fs::File;
use std::ops::Range;

use super::cluster::{Clusters, State};
use super::header::Header;
use super::{entries, read};
use crate::error::StoreError;
use crate::units::{to_u64, to_usize};

/// A cluster that a file has something to say about.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// Where it lies on the disk.
    pub(super) range: Range<u64>,
    /// Whether it holds bytes; it reads as zeros otherwise.
    pub(super) has_data: bool,
    entry: u64,
}

impl Found {
    /// Bytes that lie in a file as they are.
    pub(super) fn data(range: Range<u64>) -> Self {
        Self { range, has_data: true, entry: 0 }
    }
}

/// A qcow2 file.
#[derive(Debug)]
pub(super) struct Layer<'f> {
    header: Header,
    clusters: Clusters<'f>,
    l1: Vec<u64>,
    /// The lower table that was read last, and its number.
    table: (u64, Vec<u64>),
    /// The cluster that was found last.
    found: Option<Found>,
    /// Nothing was found from here on.
    end: Option<u64>,
    /// The cluster that was read last.
    bytes: (u64, Vec<u8>),
}

impl<'f> Layer<'f> {
    pub(super) fn open(file: &'f File, file_len: u64, header: Header) -> Result<Self, StoreError> {
        let l1 = read(file, header.l1_offset, to_usize(header.l1_entries) * 8)?;
        let l1 = entries(&l1).collect();
        let clusters = Clusters::new(file, file_len, &header);
        let table = (u64::MAX, Vec::new());
        Ok(Self {
            header,
            clusters,
            l1,
            table,
            found: None,
            end: None,
            bytes: (u64::MAX, Vec::new()),
        })
    }

    /// Length of the disk in bytes.
    pub(super) fn len(&self) -> u64 {
        self.header.len
    }

    /// The first cluster that ends behind `at` and is allocated here.
    pub(super) fn seek(&mut self, at: u64) -> Result<Option<Found>, StoreError> {
        if let Some(found) = &self.found
            && found.range.end > at
        {
            return Ok(Some(found.clone()));
        }
        if self.end.is_some_and(|end| at >= end) {
            return Ok(None);
        }
        self.found = self.search(at)?;
        if self.found.is_none() {
            self.end = Some(at);
        }
        Ok(self.found.clone())
    }

    fn search(&mut self, at: u64) -> Result<Option<Found>, StoreError> {
        let cluster_len = self.header.cluster_len();
        let in_table = cluster_len / 8;
        let mut cluster = at / cluster_len;
        while cluster * cluster_len < self.header.len {
            let number = cluster / in_table;
            if self.table.0 != number {
                let entry = self.l1.get(to_usize(number)).copied().unwrap_or(0);
                let table = self.clusters.table(entry)?;
                self.table = (number, table.map_or_else(Vec::new, |t| entries(&t).collect()));
            }
            let rest = self.table.1.get(to_usize(cluster % in_table)..).unwrap_or_default();
            let step = rest.iter().position(|entry| self.clusters.state(*entry) != State::Absent);
            let Some(step) = step else {
                cluster = (number + 1) * in_table;
                continue;
            };
            let entry = rest[step];
            let start = (cluster + to_u64(step)) * cluster_len;
            let range = start..(start + cluster_len).min(self.header.len);
            let has_data = self.clusters.state(entry) == State::Data;
            return Ok((start < self.header.len).then_some(Found { range, has_data, entry }));
        }
        Ok(None)
    }

    /// Copies a part of a cluster that was found.
    pub(super) fn read(
        &mut self,
        found: &Found,
        at: u64,
        out: &mut [u8],
    ) -> Result<(), StoreError> {
        let start = found.range.start;
        if self.bytes.0 != start {
            let mut bytes = std::mem::take(&mut self.bytes.1);
            bytes.clear();
            bytes.resize(to_usize(self.header.cluster_len()), 0);
            self.clusters.read(found.entry, &mut bytes)?;
            self.bytes = (start, bytes);
        }
        let inside = to_usize(at - start);
        out.copy_from_slice(&self.bytes.1[inside..inside + out.len()]);
        Ok(())
    }
}
