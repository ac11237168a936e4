//! The page server's own view of a pool: the one way by which bytes get in.
//!
//! Invariant: nobody ever stores through this mapping. A page appears in the
//! pool whole or not at all, because the kernel copies it before it makes it
//! visible (`UFFDIO_COPY`). Other processes see pages of the same file, so a
//! store would be seen half done.
#![expect(unsafe_code, reason = "mmap, munmap and the ioctls that fill memory")]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use userfaultfd::Error;

use super::memfd::PoolFile;
use super::userfault::{Userfault, to_io};

const PAGE: usize = 4096;

/// What became of an attempt to install pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Installed {
    /// This attempt put them there.
    New,
    /// They were there already.
    Present,
}

/// A shared mapping of a whole pool, registered for missing pages.
#[derive(Debug)]
pub(crate) struct SideMapping {
    address: usize,
    pages: u64,
    userfault: Userfault,
}

impl SideMapping {
    /// Maps the pool's file.
    pub(crate) fn new(pool: &PoolFile) -> io::Result<Self> {
        let len = pool.file().metadata()?.len();
        let size = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: without MAP_FIXED the kernel picks an unused range, so no
        // existing object is affected.
        let start =
            unsafe { libc::mmap(null_mut(), size, prot, flags, pool.file().as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let userfault = Userfault::new();
        let address = start.expose_provenance();
        let side = match userfault {
            Ok(userfault) => Self { address, pages: len / PAGE as u64, userfault },
            Err(error) => {
                // SAFETY: the range was mapped above and nobody knows of it.
                let _refusal = unsafe { libc::munmap(start, size) };
                return Err(error);
            }
        };
        for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
            // SAFETY: the range is this mapping, and the advice changes no
            // contents. A kernel without a feature has nothing to switch off.
            let _refusal = unsafe { libc::madvise(start, size, advice) };
        }
        side.userfault.register(address as u64, size)?;
        Ok(side)
    }

    /// Makes a page appear with these bytes, unless it is there already.
    pub(crate) fn install(&self, page: u64, bytes: &[u8; PAGE]) -> io::Result<Installed> {
        let target = self.pointer(page, 1)?;
        settle(|| {
            // SAFETY: the target is one page of this mapping, of which no
            // reference exists, and the source is a whole page.
            unsafe { self.userfault.inner().copy(bytes.as_ptr().cast(), target, PAGE, false) }
        })
    }

    /// Makes pages appear from `page` on, up to the first that is there
    /// already; returns how many did. None means that the first is there, or
    /// that the kernel is busy: [`SideMapping::install`] tells.
    pub(crate) fn install_run(&self, page: u64, bytes: &[u8]) -> io::Result<u64> {
        let count = bytes.len() / PAGE;
        let target = self.pointer(page, count as u64)?;
        // SAFETY: the target is that many pages of this mapping, of which no
        // reference exists, and the source is as long.
        let copied = unsafe {
            self.userfault.inner().copy(bytes.as_ptr().cast(), target, count * PAGE, false)
        };
        let copied = match copied {
            Ok(copied) | Err(Error::PartiallyCopied(copied)) => copied,
            Err(error) => match to_io(error) {
                error if error.raw_os_error() == Some(libc::EEXIST) => 0,
                error => return Err(error),
            },
        };
        // A busy kernel leaves a negative number behind.
        Ok(if copied <= count * PAGE { (copied / PAGE) as u64 } else { 0 })
    }

    /// Makes a page of zeros appear, unless something is there already.
    pub(crate) fn install_zeros(&self, page: u64) -> io::Result<Installed> {
        let target = self.pointer(page, 1)?;
        settle(|| {
            // SAFETY: the target is one page of this mapping, of which no
            // reference exists.
            unsafe { self.userfault.inner().zeropage(target, PAGE, false) }
        })
    }

    fn pointer(&self, page: u64, count: u64) -> io::Result<*mut std::ffi::c_void> {
        let end = page.checked_add(count).filter(|end| *end <= self.pages);
        let offset = end.and_then(|end| usize::try_from(end - count).ok());
        let offset = offset.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(std::ptr::with_exposed_provenance_mut(self.address + offset * PAGE))
    }
}

/// Tries until the kernel has decided. It says EAGAIN while the address space
/// changes under it (a pool being opened beside), and EEXIST if another
/// thread was first.
fn settle(mut attempt: impl FnMut() -> userfaultfd::Result<usize>) -> io::Result<Installed> {
    loop {
        match attempt().map_err(to_io) {
            Ok(PAGE) => return Ok(Installed::New),
            Ok(_) => std::thread::yield_now(),
            Err(error) => match error.raw_os_error() {
                Some(libc::EEXIST) => return Ok(Installed::Present),
                Some(libc::EAGAIN) => std::thread::yield_now(),
                _ => return Err(error),
            },
        }
    }
}

impl Drop for SideMapping {
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut(self.address);
        let size = usize::try_from(self.pages).map_or(0, |pages| pages * PAGE);
        // SAFETY: the range is this mapping and the last handle on it.
        let _refusal = unsafe { libc::munmap(start, size) };
    }
}
