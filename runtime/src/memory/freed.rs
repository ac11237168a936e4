//! Memory that the guest says it does not use.
//!
//! Such pages are given back to the host, and later captures hold zeros in their
//! place. Until the guest uses one again, what it would read there is nobody's
//! promise: zeros in a machine that booted, and what its pool shows in one that
//! continues. A page that is written again is the machine's own like any other,
//! so it needs no note: whoever captures takes the machine's own pages first, and
//! zeros for the rest of those that were ever freed.
//!
//! Invariant: a page that a capture still has to copy is not given back before it
//! was copied. Each of the machine's own pages is written to (with what it holds)
//! before it goes, and a write to a protected page waits for the copy.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestAddress};

use super::ram::Ram;
use crate::pages::PageSet;
use crate::protocol::{PAGE_SIZE, PageRun};
use crate::sys::pagemap::Pagemap;

/// What the guest has freed since its machine was made.
#[derive(Debug)]
pub(crate) struct Freed {
    ram: Arc<Ram>,
    pagemap: Pagemap,
    pages: Mutex<PageSet>,
}

impl Freed {
    /// Nothing yet. `pagemap` is this process's.
    pub(crate) fn new(ram: Arc<Ram>, pagemap: Pagemap) -> Self {
        let pages = PageSet::empty(ram.layout().len() / PAGE_SIZE);
        Self { ram, pagemap, pages: Mutex::new(pages) }
    }

    /// Gives the pages that lie in `start..start + len` back to the host; false
    /// if that is not all memory. Only while the machine may change.
    pub(crate) fn release(&self, start: u64, len: u64) -> bool {
        let Some(end) = start.checked_add(len) else { return false };
        let first = start.next_multiple_of(PAGE_SIZE);
        let behind = end / PAGE_SIZE * PAGE_SIZE;
        for range in self.ram.layout().ranges() {
            if start >= range.gpa && end <= range.gpa + range.len {
                if first < behind {
                    self.drop_pages(first, first - range.gpa + range.offset, behind - first);
                }
                return true;
            }
        }
        false
    }

    fn drop_pages(&self, guest: u64, offset: u64, len: u64) {
        let address = self.ram.mapping().address() + offset;
        let own = match self.pagemap.dirty(address..address + len) {
            Ok(own) => own,
            Err(error) => return tracing::warn!("freed memory stays: {error}"),
        };
        for page in own.iter().flat_map(|run| run.first..run.first + run.count) {
            self.write_same(guest + page * PAGE_SIZE);
        }
        // Noted first: from then on nobody stores what is there.
        self.pages().add(offset / PAGE_SIZE..(offset + len) / PAGE_SIZE);
        self.ram.mapping().discard(offset, len);
    }

    /// Waits until no capture needs the page any more.
    fn write_same(&self, page: u64) {
        let memory = self.ram.guest();
        let at = GuestAddress(page);
        let same = memory.read_obj::<u8>(at).and_then(|byte| memory.write_obj(byte, at));
        if let Err(error) = same {
            tracing::warn!("freed memory: {error}");
        }
    }

    /// All that was ever freed, as ascending runs that do not touch.
    pub(crate) fn runs(&self) -> Vec<PageRun> {
        self.pages().runs()
    }

    fn pages(&self) -> MutexGuard<'_, PageSet> {
        // Pages are only ever added.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::RamLayout;

    const PAGES: u64 = 4096;

    fn freed(ram: Ram) -> Freed {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        Freed::new(Arc::new(ram), Pagemap::new(pagemap.into()))
    }

    fn layout() -> RamLayout {
        RamLayout::new(PAGES * PAGE_SIZE).unwrap()
    }

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first, count }
    }

    fn own(freed: &Freed) -> u64 {
        let start = freed.ram.mapping().address();
        freed.pagemap.count(start..start + PAGES * PAGE_SIZE).unwrap().private
    }

    #[test]
    fn pages_that_were_written_go_and_are_noted() {
        let freed = freed(Ram::anonymous(layout()).unwrap());
        let guest = freed.ram.guest();
        for page in 0..PAGES {
            guest.write_obj(7u8, GuestAddress(page * PAGE_SIZE + 5)).unwrap();
        }
        assert_eq!(own(&freed), PAGES);
        // Only whole pages.
        assert!(freed.release(100 * PAGE_SIZE + 1, 3 * PAGE_SIZE));
        assert!(freed.release(200 * PAGE_SIZE, 64 * PAGE_SIZE));
        assert!(freed.release(300 * PAGE_SIZE, 17));
        assert_eq!(own(&freed), PAGES - 66);
        assert_eq!(freed.runs(), [run(101, 2), run(200, 64)]);
        let read = |page| guest.read_obj::<u8>(GuestAddress(page * PAGE_SIZE + 5)).unwrap();
        assert_eq!([100, 101, 102, 103, 199, 200, 263, 264].map(read), [7, 0, 0, 7, 7, 0, 0, 7]);
        guest.write_obj(9u8, GuestAddress(230 * PAGE_SIZE)).unwrap();
        assert_eq!(own(&freed), PAGES - 65);
    }

    #[test]
    fn pages_of_a_pool_lose_what_was_written_to_them() {
        let file =
            File::from(rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(PAGES * PAGE_SIZE).unwrap();
        file.write_all_at(&[3], 10 * PAGE_SIZE).unwrap();
        let freed = freed(Ram::of_pieces(&[(run(0, PAGES), &file)], layout()).unwrap());
        let guest = freed.ram.guest();
        guest.write_obj(4u8, GuestAddress(10 * PAGE_SIZE)).unwrap();
        assert_eq!(own(&freed), 1);
        assert!(freed.release(0, PAGES * PAGE_SIZE));
        assert_eq!((own(&freed), freed.runs()), (0, vec![run(0, PAGES)]));
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        let freed = freed(Ram::anonymous(layout()).unwrap());
        let end = PAGES * PAGE_SIZE;
        for (start, len) in [(end, 1), (end - 1, 2), (u64::MAX, 2), (0, end + 1), (1 << 32, 4096)] {
            assert!(!freed.release(start, len), "{start:#x} + {len:#x}");
        }
        assert!(freed.runs().is_empty());
    }
}
