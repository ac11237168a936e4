//! The mappings whose missing pages the page server fills.
//!
//! The userfaultfd belongs to the address space that opened it, so the machine
//! opens it and hands it over. Each pooled mapping is registered once, whole,
//! before the guest can reach it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use userfaultfd::{Uffd, UffdBuilder};

use crate::protocol::{Content, PAGE_SIZE, Region};
use crate::sys::mapping::Mapping;
use crate::sys::userfault::machine_features;

/// Why the page server cannot be given this process's memory.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegionError {
    /// No userfaultfd.
    #[error("cannot open /dev/userfaultfd: {0}")]
    Open(userfaultfd::Error),
    /// A mapping was refused.
    #[error("cannot register {len} bytes with userfaultfd: {source}")]
    Register {
        /// Length of the mapping in bytes.
        len: usize,
        /// The kernel's answer.
        source: userfaultfd::Error,
    },
    /// The process cannot look at itself.
    #[error("cannot open {path}: {source}")]
    Proc {
        /// The file.
        path: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What the supervisor gets with `Built`.
#[derive(Debug)]
pub(super) struct Handover {
    uffd: Uffd,
    pagemap: std::fs::File,
    memory: std::fs::File,
    regions: Vec<Region>,
}

impl Handover {
    /// Opens the descriptors.
    pub(super) fn new() -> Result<Self, RegionError> {
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            // KVM touches guest memory from inside the kernel.
            .user_mode_only(false)
            .require_features(machine_features())
            .create()
            .map_err(RegionError::Open)?;
        let pagemap = open("/proc/self/pagemap")?;
        let memory = open("/proc/self/mem")?;
        Ok(Self { uffd, pagemap, memory, regions: Vec::new() })
    }

    /// Adds a mapping; a pooled one is registered.
    pub(super) fn add(
        &mut self,
        content: Content,
        mapping: &Mapping,
        pooled: bool,
    ) -> Result<(), RegionError> {
        let len = (mapping.len() as u64).next_multiple_of(PAGE_SIZE);
        if pooled {
            let size = mapping.len().next_multiple_of(4096);
            self.uffd
                .register(mapping.pointer().cast(), size)
                .map_err(|source| RegionError::Register { len: size, source })?;
        }
        let address = mapping.address();
        self.regions.push(Region { content, address, len, offset: 0, pooled });
        Ok(())
    }

    /// All mappings.
    pub(super) fn regions(&self) -> Vec<Region> {
        self.regions.clone()
    }

    /// The descriptors, in the order of the protocol.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [uffd::borrow(&self.uffd), self.pagemap.as_fd(), self.memory.as_fd()]
    }
}

fn open(path: &'static str) -> Result<std::fs::File, RegionError> {
    std::fs::File::open(path).map_err(|source| RegionError::Proc { path, source })
}

mod uffd {
    #![expect(unsafe_code, reason = "Uffd only offers its raw descriptor")]

    use std::os::fd::{AsRawFd, BorrowedFd};

    use super::Uffd;

    pub(super) fn borrow(uffd: &Uffd) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `uffd` is borrowed.
        unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) }
    }
}
