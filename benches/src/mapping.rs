//! Mappings of memory, as machines and the bare fault handler have them.
#![expect(unsafe_code, reason = "mmap, munmap and touching mapped pages")]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use crate::guest::PAGE;

/// A mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    address: usize,
    len: usize,
}

impl Mapping {
    /// Maps a file copy-on-write.
    pub fn of(file: &std::fs::File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        Self::new(len, libc::MAP_PRIVATE | libc::MAP_NORESERVE, file.as_raw_fd())
    }

    /// Maps a file so that others see what is put into it.
    pub fn shared(file: &std::fs::File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        Self::new(len, libc::MAP_SHARED | libc::MAP_NORESERVE, file.as_raw_fd())
    }

    /// Maps memory that nobody else has.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let mapping = Self::new(len, flags, -1)?;
        let start = mapping.pointer(0).cast();
        // SAFETY: the range is this mapping and the advice changes no bytes.
        let _refusal = unsafe { libc::madvise(start, len, libc::MADV_NOHUGEPAGE) };
        Ok(mapping)
    }

    fn new(len: usize, flags: i32, fd: i32) -> io::Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without MAP_FIXED no existing mapping is affected.
        let start = unsafe { libc::mmap(null_mut(), len, prot, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: start.expose_provenance(), len })
    }

    /// Where it lies.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Its length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    fn pointer(&self, page: usize) -> *mut u64 {
        assert!(page * PAGE < self.len, "page {page} is not in the mapping");
        std::ptr::with_exposed_provenance_mut(self.address + page * PAGE)
    }

    /// Reads the first word of a page.
    pub fn read(&self, page: usize) -> u64 {
        // SAFETY: the page lies in the mapping; the guest may write to it at
        // the same time, which a volatile read tolerates.
        unsafe { self.pointer(page).read_volatile() }
    }

    /// Maps all pages of the file that are resident, without copies.
    pub fn populate_read(&self) -> io::Result<()> {
        let start = self.pointer(0).cast();
        // SAFETY: the range is this mapping and no bytes change.
        match unsafe { libc::madvise(start, self.len, libc::MADV_POPULATE_READ) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: the range is this mapping and the last handle on it.
        let _refusal = unsafe { libc::munmap(start, self.len) };
    }
}
