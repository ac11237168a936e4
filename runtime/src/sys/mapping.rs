//! An owned memory mapping.
//!
//! Invariant: `address..address + len` is one mapping of this process that
//! nobody else unmaps or replaces while the value lives.
#![expect(unsafe_code, reason = "mmap, madvise and munmap have no safe form")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, null_mut};

use vm_memory::VolatileSlice;

use crate::protocol::{PAGE_SIZE, PageRun};

/// Why memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MappingError {
    /// The kernel refused.
    #[error("cannot map {len} bytes: {source}")]
    Map {
        /// Wanted length in bytes.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Touching what lies behind the end of a file would kill the process.
    #[error("the file has {actual} bytes where {wanted} are to be mapped")]
    FileTooShort {
        /// Length of the file in bytes.
        actual: u64,
        /// Length of the mapping in bytes.
        wanted: u64,
    },
    /// Pieces that leave a gap, overlap, or end elsewhere.
    #[error("the pieces of memory do not follow each other at {0:#x}")]
    Pieces(u64),
    /// The length does not fit this machine's address space.
    #[error("{0} bytes do not fit the address space")]
    TooLong(u64),
}

/// A private mapping, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and the value
// only hands out its address and volatile views of its bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method changes the value itself.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed memory that is allocated page by page, never as huge pages:
    /// what is dirty must be visible in steps of 4 KiB.
    pub(crate) fn anonymous(len: u64) -> Result<Self, MappingError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let mapping = Self::map(len, libc::PROT_READ | libc::PROT_WRITE, flags, -1)?;
        mapping.advise(libc::MADV_NOHUGEPAGE);
        Ok(mapping)
    }

    /// A file's first `len` bytes, copied on write.
    pub(crate) fn private(file: &File, len: u64, writable: bool) -> Result<Self, MappingError> {
        longer_than(file, len)?;
        let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        Self::map(len, prot, flags, file.as_raw_fd())
    }

    /// Pieces of files, each at its own offset, copied on write. Together they
    /// are `0..len`.
    pub(crate) fn private_pieces(
        len: u64,
        pieces: &[(PageRun, &File)],
    ) -> Result<Self, MappingError> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let mapping = Self::map(len, libc::PROT_NONE, flags | libc::MAP_ANONYMOUS, -1)?;
        let mut end = 0;
        for (run, file) in pieces {
            let (start, size) = (run.first * PAGE_SIZE, run.count * PAGE_SIZE);
            if start != end || start + size > len {
                return Err(MappingError::Pieces(start));
            }
            end = start + size;
            longer_than(file, end)?;
            mapping.place(start, size, prot, flags, file)?;
        }
        if end != len {
            return Err(MappingError::Pieces(end));
        }
        mapping.advise(libc::MADV_DONTDUMP);
        Ok(mapping)
    }

    /// Puts a part of a file over a part of the mapping.
    fn place(
        &self,
        start: u64,
        size: u64,
        prot: i32,
        flags: i32,
        file: &File,
    ) -> Result<(), MappingError> {
        let too_long = |_| MappingError::TooLong(start);
        let at = usize::try_from(start).map_err(too_long)?;
        let len = usize::try_from(size).map_err(too_long)?;
        let offset = i64::try_from(start).map_err(too_long)?;
        // SAFETY: the caller has checked that the part lies in the mapping.
        let target = unsafe { self.pointer().add(at) };
        let flags = flags | libc::MAP_FIXED;
        // SAFETY: the range belongs to this mapping alone, in which nobody
        // has stored anything yet.
        let placed =
            unsafe { libc::mmap(target.cast(), len, prot, flags, file.as_raw_fd(), offset) };
        if placed == libc::MAP_FAILED {
            return Err(MappingError::Map { len: size, source: io::Error::last_os_error() });
        }
        Ok(())
    }

    fn map(len: u64, prot: i32, flags: i32, fd: i32) -> Result<Self, MappingError> {
        let size = usize::try_from(len).map_err(|_| MappingError::TooLong(len))?;
        // SAFETY: without MAP_FIXED the kernel picks an unused range, so no
        // existing object is affected.
        let address = unsafe { libc::mmap(null_mut(), size, prot, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(MappingError::Map { len, source: io::Error::last_os_error() });
        }
        let address = NonNull::new(address.cast()).ok_or(MappingError::TooLong(len))?;
        let mapping = Self { address, len: size };
        mapping.advise(libc::MADV_DONTDUMP);
        Ok(mapping)
    }

    /// Advice is best effort: a kernel without the feature has nothing to
    /// switch off.
    fn advise(&self, advice: i32) {
        // SAFETY: the range is this mapping, and neither advice used here
        // changes its contents.
        let _refusal = unsafe { libc::madvise(self.pointer().cast::<c_void>(), self.len, advice) };
    }

    /// Gives a part of it back: what was written there is gone, and what was
    /// mapped there shows again. Best effort, as all advice.
    pub(crate) fn discard(&self, start: u64, len: u64) {
        let (Ok(at), Ok(len)) = (usize::try_from(start), usize::try_from(len)) else { return };
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return;
        }
        // SAFETY: the part lies in the mapping.
        let target = unsafe { self.pointer().add(at) };
        // SAFETY: the range is of this mapping, of which only volatile views are
        // handed out; they tolerate that its bytes change.
        let _refusal = unsafe { libc::madvise(target.cast(), len, libc::MADV_DONTNEED) };
    }

    /// Where it lies in this process.
    pub(crate) fn pointer(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Where it lies in this process, as a number.
    pub(crate) fn address(&self) -> u64 {
        self.address.as_ptr() as u64
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The bytes, for copying out; a touch may wait for the page server.
    pub(crate) fn bytes(&self) -> VolatileSlice<'_> {
        // SAFETY: the range stays mapped for as long as `self` is borrowed,
        // and volatile access tolerates changes from elsewhere.
        unsafe { VolatileSlice::new(self.pointer(), self.len) }
    }
}

/// Touching what lies behind the end of a file would kill the process.
fn longer_than(file: &File, len: u64) -> Result<(), MappingError> {
    let refused = |source| MappingError::Map { len, source };
    match file.metadata().map_err(refused)?.len() {
        actual if actual < len => Err(MappingError::FileTooShort { actual, wanted: len }),
        _ => Ok(()),
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping and the last handle on it.
        let _refusal = unsafe { libc::munmap(self.pointer().cast::<c_void>(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn file_of(bytes: &[u8]) -> File {
        use std::io::Write;
        let mut file =
            File::from(rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_private_mapping_leaves_the_file_alone() {
        use std::os::unix::fs::FileExt;
        let file = file_of(&[7; 8192]);
        let mapping = Mapping::private(&file, 8192, true).unwrap();
        mapping.bytes().write_obj(9u8, 4096).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 4096).unwrap();
        assert_eq!(byte, [7]);
        assert_eq!(mapping.bytes().read_obj::<u8>(4096).unwrap(), 9);
    }

    #[test]
    fn pieces_show_their_files() {
        let (one, other) = (file_of(&[1; 16384]), file_of(&[2; 16384]));
        let run = |first, count| PageRun { first, count };
        let pieces = [(run(0, 1), &one), (run(1, 2), &other), (run(3, 1), &one)];
        let mapping = Mapping::private_pieces(16384, &pieces).unwrap();
        let seen: Vec<u8> =
            (0..4).map(|page| mapping.bytes().read_obj(page * 4096 + 5).unwrap()).collect();
        assert_eq!(seen, [1, 2, 2, 1]);
        for bad in [vec![(run(0, 1), &one)], vec![(run(0, 1), &one), (run(2, 2), &one)]] {
            let error = Mapping::private_pieces(16384, &bad).unwrap_err();
            assert!(matches!(error, MappingError::Pieces(_)), "{error}");
        }
        let long = Mapping::private_pieces(20480, &[(run(0, 5), &one)]).unwrap_err();
        assert!(matches!(long, MappingError::FileTooShort { .. }), "{long}");
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let error = Mapping::private(&file_of(&[0; 4096]), 8192, false).unwrap_err();
        assert!(matches!(error, MappingError::FileTooShort { actual: 4096, wanted: 8192 }));
    }
}
