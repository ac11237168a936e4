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
//! A file may be written over others, which have to be given.
//!
//! After the specification, `docs/interop/qcow2.txt` in QEMU's sources.

mod chain;
mod cluster;
mod header;
mod layer;
#[cfg(test)]
pub(crate) mod tests;

use std::fs::File;
use std::os::unix::fs::FileExt;

pub(super) use chain::Chain;

use crate::error::{Qcow2Error, StoreError};

/// How a qcow2 file begins.
const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Whether the file says that it is qcow2.
pub(super) fn is_qcow2(input: &File) -> Result<bool, StoreError> {
    let mut magic = [0; MAGIC.len()];
    match input.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(magic == MAGIC),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(StoreError::transfer("read input")(error)),
    }
}

/// Reads every cluster and keeps none, for tests with hostile files.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn read_all(file: &File) -> Result<(), StoreError> {
    Chain::open(file, &[])?.for_each(|_, _| Ok(()))
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
