//! The least that answers a fault: one thread that polls a userfaultfd, reads
//! it and copies a page to where it is missing.
#![expect(unsafe_code, reason = "UFFDIO_COPY fills the memory of another process")]

use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use userfaultfd::{Event, EventBuffer, Uffd};

use crate::guest::PAGE;

/// The thread. Dropping it ends it.
#[derive(Debug)]
pub struct BareHandler {
    stop: Arc<AtomicBool>,
    bell: Arc<OwnedFd>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl BareHandler {
    /// Answers the faults of another process.
    pub fn start(userfault: OwnedFd) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let (seen, rung) = (Arc::clone(&stop), Arc::clone(&bell));
        // SAFETY: the descriptor was owned and is given up here.
        let uffd = unsafe { Uffd::from_raw_fd(userfault.into_raw_fd()) };
        let thread = std::thread::spawn(move || answer(&uffd, &rung, &seen));
        Ok(Self { stop, bell, thread: Some(thread) })
    }
}

fn answer(uffd: &Uffd, bell: &OwnedFd, stop: &AtomicBool) -> Result<()> {
    let page = [0x5A_u8; PAGE];
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
                let start = addr.map_addr(|address| address & !(PAGE - 1));
                // SAFETY: the page is missing in the memory of another
                // process, which registered it for this.
                unsafe { uffd.copy(page.as_ptr().cast(), start, PAGE, true) }?;
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
