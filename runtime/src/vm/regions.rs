//! The mappings whose missing pages the page server fills.
//!
//! The userfaultfd belongs to the address space that opened it, so the machine
//! opens it and hands it over. Each pooled mapping is registered once, whole,
//! before the guest can reach it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use userfaultfd::Uffd;

use super::sources::Sources;
use crate::protocol::{Content, PAGE_SIZE, PageRun, Region};
use crate::sys::mapping::Mapping;
use crate::sys::pagemap::Pagemap;
use crate::sys::userfault::machine_features;

/// Why the page server cannot be given this process's memory.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegionError {
    /// No userfaultfd.
    #[error("cannot open /dev/userfaultfd: {0}")]
    Open(io::Error),
    /// A mapping was refused.
    #[error("cannot register {len} bytes with userfaultfd: {source}")]
    Register {
        /// Length of the mapping in bytes.
        len: usize,
        /// The kernel's answer.
        source: userfaultfd::Error,
    },
    /// The process cannot look at itself.
    #[error("cannot open /proc/self/{name}: {source}")]
    Proc {
        /// The file.
        name: &'static str,
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
    pub(super) fn new(sources: &Sources) -> Result<Self, RegionError> {
        let uffd = sources.userfault(machine_features())?;
        let pagemap = sources.of_this_process("pagemap")?;
        let memory = sources.of_this_process("mem")?;
        Ok(Self { uffd, pagemap, memory, regions: Vec::new() })
    }

    /// Adds a mapping of no pool.
    pub(super) fn add_own(&mut self, content: Content, mapping: &Mapping) {
        let len = (mapping.len() as u64).next_multiple_of(PAGE_SIZE);
        self.regions.push(Region {
            content,
            address: mapping.address(),
            len,
            offset: 0,
            pooled: false,
        });
    }

    /// Registers a mapping of pools, and adds each of its pieces.
    pub(super) fn add_pooled(
        &mut self,
        content: Content,
        mapping: &Mapping,
        pieces: &[PageRun],
    ) -> Result<(), RegionError> {
        let size = mapping.len().next_multiple_of(4096);
        self.uffd
            .register(mapping.pointer().cast(), size)
            .map_err(|source| RegionError::Register { len: size, source })?;
        for piece in pieces {
            let (offset, len) = (piece.first * PAGE_SIZE, piece.count * PAGE_SIZE);
            let address = mapping.address() + offset;
            self.regions.push(Region { content, address, len, offset, pooled: true });
        }
        Ok(())
    }

    /// This process's page tables, once more.
    pub(super) fn pagemap(&self) -> Result<Pagemap, RegionError> {
        let again = self.pagemap.try_clone();
        let pagemap = again.map_err(|source| RegionError::Proc { name: "pagemap", source })?;
        Ok(Pagemap::new(pagemap.into()))
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

mod uffd {
    #![expect(unsafe_code, reason = "Uffd only offers its raw descriptor")]

    use std::os::fd::{AsRawFd, BorrowedFd};

    use super::Uffd;

    pub(super) fn borrow(uffd: &Uffd) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `uffd` is borrowed.
        unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) }
    }
}
