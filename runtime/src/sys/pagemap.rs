//! What the kernel says about pages of a process: `PAGEMAP_SCAN` on a
//! `/proc/self/pagemap` that the process handed over.
//!
//! A page of a pooled mapping is *dirty* if it is present or swapped and not
//! of the file: its machine made a private copy by writing. The shared zero
//! page counts as clean.
#![expect(unsafe_code, reason = "PAGEMAP_SCAN is an ioctl")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::protocol::{PAGE_SIZE, PageRun};

/// `struct pm_scan_arg` of the kernel's ABI (Linux 6.7).
#[repr(C)]
#[derive(Default)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of the kernel's ABI.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610;
const _: () = assert!(size_of::<ScanArgs>() == 0x60);
const _: () = assert!(size_of::<PageRegion>() == 24);

const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const PFNZERO: u64 = 1 << 5;

/// Regions that one call can return; a longer answer takes more calls.
///
/// The kernel gathers regions in batches of 512 and forgets, if a later batch
/// of the same call ends the range, to move `walk_end` there (seen on 6.18):
/// going on from it yields the same regions twice. With room for one batch
/// this cannot happen.
const BATCH: usize = 512;

/// Why a scan failed.
#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    /// A range must consist of whole pages.
    #[error("{start:#x}..{end:#x} does not consist of whole pages")]
    Unaligned {
        /// First address.
        start: u64,
        /// Address behind the last.
        end: u64,
    },
    /// The kernel refused.
    #[error("cannot scan the pages {start:#x}..{end:#x}; PAGEMAP_SCAN needs Linux 6.7")]
    Scan {
        /// First address.
        start: u64,
        /// Address behind the last.
        end: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Pages of a range by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Mapped from the file: shared with everybody who maps it.
    pub shared: u64,
    /// The process's own.
    pub private: u64,
}

/// The page tables of the process that opened the descriptor.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Takes over the descriptor.
    pub fn new(descriptor: OwnedFd) -> Self {
        Self(File::from(descriptor))
    }

    /// The dirty pages of an address range, as ascending runs that do not
    /// touch; pages are counted from the start of the range.
    pub fn dirty(&self, range: Range<u64>) -> Result<Vec<PageRun>, PagemapError> {
        let mut runs: Vec<PageRun> = Vec::new();
        let base = range.start;
        let query = Query { exclude: FILE | PFNZERO, report: FILE };
        self.scan(range, query, &mut |region| {
            let first = (region.start - base) / PAGE_SIZE;
            let count = (region.end - region.start) / PAGE_SIZE;
            match runs.last_mut() {
                Some(last) if last.first + last.count == first => last.count += count,
                _ => runs.push(PageRun { first, count }),
            }
        })?;
        Ok(runs)
    }

    /// Counts the pages of an address range.
    pub fn count(&self, range: Range<u64>) -> Result<PageCounts, PagemapError> {
        let mut counts = PageCounts::default();
        let query = Query { exclude: PFNZERO, report: FILE | PRESENT };
        self.scan(range, query, &mut |region| {
            let pages = (region.end - region.start) / PAGE_SIZE;
            match (region.categories & FILE != 0, region.categories & PRESENT != 0) {
                (true, true) => counts.shared += pages,
                (false, _) => counts.private += pages,
                (true, false) => {}
            }
        })?;
        Ok(counts)
    }

    /// Walks the pages that are present or swapped, except those of the
    /// excluded categories.
    fn scan(
        &self,
        range: Range<u64>,
        query: Query,
        sink: &mut dyn FnMut(&PageRegion),
    ) -> Result<(), PagemapError> {
        let (mut start, end) = (range.start, range.end);
        if !start.is_multiple_of(PAGE_SIZE) || !end.is_multiple_of(PAGE_SIZE) || start > end {
            return Err(PagemapError::Unaligned { start, end });
        }
        let mut found = vec![PageRegion::default(); BATCH];
        while start < end {
            let failed = |source| PagemapError::Scan { start, end, source };
            let (count, walked) = self.step(start..end, query, &mut found).map_err(failed)?;
            found[..count].iter().for_each(&mut *sink);
            if walked <= start {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            let reported = count.checked_sub(1).map_or(0, |last| found[last].end);
            start = walked.max(reported);
        }
        Ok(())
    }

    /// One call: how many regions it found and how far it came.
    fn step(
        &self,
        range: Range<u64>,
        query: Query,
        found: &mut [PageRegion],
    ) -> io::Result<(usize, u64)> {
        loop {
            let mut args = ScanArgs {
                size: size_of::<ScanArgs>() as u64,
                start: range.start,
                end: range.end,
                vec: found.as_mut_ptr() as u64,
                vec_len: found.len() as u64,
                category_inverted: query.exclude,
                category_mask: query.exclude,
                category_anyof_mask: PRESENT | SWAPPED,
                return_mask: query.report,
                ..ScanArgs::default()
            };
            // SAFETY: the argument is the structure of this ioctl; `vec` and
            // `vec_len` describe a buffer that is exclusively borrowed.
            let result = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut args) };
            if let Ok(count) = usize::try_from(result) {
                return Ok((count.min(found.len()), args.walk_end));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// What a scan leaves out, and by which categories it tells regions apart.
#[derive(Debug, Clone, Copy)]
struct Query {
    exclude: u64,
    report: u64,
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
