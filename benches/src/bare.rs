//! The least that answers a fault: one thread that polls a userfaultfd, reads
//! it and copies a page to where it is missing, or into a pool.
#![expect(unsafe_code, reason = "UFFDIO_COPY fills the memory of another process")]

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use userfaultfd::{Event, EventBuffer, Uffd, UffdBuilder};

use crate::guest::PAGE;
use crate::mapping::Mapping;

/// What is done with a fault.
trait Fill: Send + 'static {
    fn fill(&self, faulting: &Uffd, address: usize) -> Result<()>;
}

/// Copies into the memory of the process that faulted.
struct Direct;

impl Fill for Direct {
    fn fill(&self, faulting: &Uffd, address: usize) -> Result<()> {
        let target = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: the page is missing in the memory of another process, which
        // registered it for this.
        unsafe { faulting.copy(BYTES.as_ptr().cast(), target, PAGE, true) }?;
        Ok(())
    }
}

/// Copies into a file that the process maps, and wakes it.
struct Beside {
    side: Mapping,
    userfault: Uffd,
    /// Where the file lies in the process that faults.
    base: usize,
}

impl Fill for Beside {
    fn fill(&self, faulting: &Uffd, address: usize) -> Result<()> {
        let offset = address - self.base;
        let target = usize::try_from(self.side.address())? + offset;
        let target = std::ptr::with_exposed_provenance_mut(target);
        // SAFETY: the page lies in this process's own mapping of the file, of
        // whose bytes no reference exists.
        unsafe { self.userfault.copy(BYTES.as_ptr().cast(), target, PAGE, false) }?;
        faulting.wake(std::ptr::with_exposed_provenance_mut(address), PAGE)?;
        Ok(())
    }
}

static BYTES: [u8; PAGE] = [0x5A; PAGE];

/// The thread. Dropping it ends it.
#[derive(Debug)]
pub struct BareHandler {
    stop: Arc<AtomicBool>,
    bell: Arc<OwnedFd>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl BareHandler {
    /// Answers the faults of another process with pages of its own.
    pub fn start(userfault: OwnedFd) -> Result<Self> {
        Self::with(userfault, Direct)
    }

    /// Answers the faults of another process, which maps this file at `base`.
    pub fn start_beside(userfault: OwnedFd, file: &File, base: u64) -> Result<Self> {
        let side = Mapping::shared(file)?;
        let own = UffdBuilder::new().close_on_exec(true).user_mode_only(false).create()?;
        let start = usize::try_from(side.address())?;
        own.register(std::ptr::with_exposed_provenance_mut(start), side.len())?;
        Self::with(userfault, Beside { side, userfault: own, base: usize::try_from(base)? })
    }

    fn with(userfault: OwnedFd, fill: impl Fill) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let (seen, rung) = (Arc::clone(&stop), Arc::clone(&bell));
        // SAFETY: the descriptor was owned and is given up here.
        let uffd = unsafe { Uffd::from_raw_fd(userfault.into_raw_fd()) };
        let thread = std::thread::spawn(move || answer(&uffd, &fill, &rung, &seen));
        Ok(Self { stop, bell, thread: Some(thread) })
    }
}

fn answer(uffd: &Uffd, fill: &impl Fill, bell: &OwnedFd, stop: &AtomicBool) -> Result<()> {
    let mut buffer = EventBuffer::new(16);
    while !stop.load(Ordering::SeqCst) {
        let mut waiting = [
            PollFd::from_borrowed_fd(uffd.as_fd(), PollFlags::IN),
            PollFd::new(bell, PollFlags::IN),
        ];
        match poll(&mut waiting, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        for event in uffd.read_events(&mut buffer)? {
            if let Event::Pagefault { addr, .. } = event? {
                fill.fill(uffd, addr.addr() & !(PAGE - 1))?;
            }
        }
    }
    Ok(())
}

impl Drop for BareHandler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // It fails only if the counter is full, and then it rings already.
        let _full = rustix::io::write(&*self.bell, &1_u64.to_le_bytes());
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("bare fault handler: {error:#}");
        }
    }
}
