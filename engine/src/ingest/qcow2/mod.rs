//! qcow2: the disk format of QEMU, read without trusting it.
//!
//! A qcow2 file maps guest clusters to clusters of the file through tables of
//! two levels. Only tables and clusters that exist are visited, so the work
//! follows what is allocated. Bounds: the upper table is no longer than the
//! virtual size needs, no host cluster is used twice, and there are at most as
//! many compressed clusters as the file has runs of 32 bytes. So a small file
//! cannot ask for endless work, and no length is trusted before it was
//! compared with the file.
//!
//! After the specification, `docs/interop/qcow2.txt` in QEMU's sources.

mod cluster;
mod header;
#[cfg(test)]
pub(crate) mod tests;

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{ImageWriter, Progress};
use crate::error::{Qcow2Error, StoreError};
use crate::units::{PAGE_LEN, to_u64, to_usize};
use cluster::Clusters;
use header::Header;

/// How a qcow2 file begins.
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of the image gathered before they are written: whole pages, whatever
/// the size of a cluster.
const WINDOW_LEN_MIN: u64 = 64 << 10;

/// Whether the file says that it is qcow2.
pub(super) fn is_qcow2(input: &File) -> Result<bool, StoreError> {
    let mut magic = [0; MAGIC.len()];
    match input.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(magic == MAGIC),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(StoreError::transfer("read input")(error)),
    }
}

/// An open qcow2 file.
#[derive(Debug)]
pub(super) struct Qcow2<'f> {
    file: &'f File,
    header: Header,
    file_len: u64,
}

impl<'f> Qcow2<'f> {
    /// Reads the header and refuses what cannot be read without other files.
    pub(super) fn open(file: &'f File) -> Result<Self, StoreError> {
        let file_len = file.metadata().map_err(StoreError::transfer("read input"))?.len();
        let header = header::read(file, file_len)?;
        Ok(Self { file, header, file_len })
    }

    /// Length of the disk in bytes.
    pub(super) fn len(&self) -> u64 {
        self.header.len
    }

    /// Writes every allocated cluster, in the order of the disk.
    pub(super) fn copy(
        &self,
        writer: &mut ImageWriter<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), StoreError> {
        let mut clusters = Clusters::new(self.file, self.file_len, &self.header);
        let table_len = to_usize(self.header.l1_entries) * 8;
        let l1 = read(self.file, self.header.l1_offset, table_len)?;
        let covered = self.header.cluster_len() * (self.header.cluster_len() / 8);
        for (entry, start) in entries(&l1).zip((0_u64..).map(|number| number * covered)) {
            if let Some(table) = clusters.table(entry)? {
                self.copy_table(&mut clusters, &table, start, writer)?;
            }
            let done = (start + covered).min(self.header.len);
            let total = Some(self.header.len);
            progress(Progress { done, total, new_bytes: writer.new_bytes() });
        }
        Ok(())
    }

    /// The clusters of one lower table, a window at a time.
    fn copy_table(
        &self,
        clusters: &mut Clusters<'_>,
        table: &[u8],
        start: u64,
        writer: &mut ImageWriter<'_>,
    ) -> Result<(), StoreError> {
        let cluster_len = self.header.cluster_len();
        let in_window = WINDOW_LEN_MIN.div_ceil(cluster_len);
        let entries: Vec<u64> = entries(table).collect();
        let mut at = start;
        for group in entries.chunks(to_usize(in_window)) {
            let len = (to_u64(group.len()) * cluster_len).min(self.header.len.saturating_sub(at));
            if len > 0 && group.iter().any(|entry| clusters.has_data(*entry)) {
                let mut window = vec![0; to_usize(in_window * cluster_len)];
                let parts = window.chunks_exact_mut(to_usize(cluster_len));
                for (entry, part) in group.iter().zip(parts) {
                    clusters.read(*entry, part)?;
                }
                writer.write(at / to_u64(PAGE_LEN), &window[..to_usize(len)])?;
            }
            at += to_u64(group.len()) * cluster_len;
        }
        Ok(())
    }
}

/// Reads every cluster and keeps none, for tests with hostile files.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn read_all(file: &File) -> Result<(), StoreError> {
    let disk = Qcow2::open(file)?;
    let mut clusters = Clusters::new(file, disk.file_len, &disk.header);
    let l1 = read(file, disk.header.l1_offset, to_usize(disk.header.l1_entries) * 8)?;
    let mut out = vec![0; to_usize(disk.header.cluster_len())];
    for entry in entries(&l1) {
        let table = clusters.table(entry)?.unwrap_or_default();
        for entry in entries(&table) {
            out.fill(0);
            clusters.read(entry, &mut out)?;
        }
    }
    Ok(())
}

/// The entries of a table.
fn entries(table: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let (entries, _) = table.as_chunks::<8>();
    entries.iter().map(|bytes| u64::from_be_bytes(*bytes))
}

fn read(file: &File, offset: u64, len: usize) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0; len];
    match file.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(Qcow2Error::Outside { what: "a table", offset }.into())
        }
        Err(error) => Err(StoreError::transfer("read input")(error)),
    }
}
