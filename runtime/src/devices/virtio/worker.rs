//! A device's thread.

use std::io;
use std::sync::Arc;

use rustix::event::epoll;
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use super::transport::Transport;
use crate::sys::event::descriptor;

/// Why a device's thread does not run.
#[derive(Debug, thiserror::Error)]
#[error("thread of device {name}: {source}")]
pub(crate) struct WorkerError {
    name: String,
    source: io::Error,
}

impl WorkerError {
    /// For the device called `name`.
    pub(super) fn of(name: &str, source: io::Error) -> Self {
        Self { name: name.to_owned(), source }
    }
}

/// Starts a thread that calls `step` whenever the driver has notified a
/// queue. Threads end with the process.
pub(super) fn serve(
    name: &str,
    transport: Arc<Transport>,
    mut step: impl FnMut(&Transport) + Send + 'static,
) -> Result<(), WorkerError> {
    let failed = |errno: Errno| WorkerError::of(name, errno.into());
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
    for notify in transport.notify() {
        let data = epoll::EventData::new_u64(0);
        let flags = epoll::EventFlags::IN;
        epoll::add(&poll, descriptor(notify), data, flags).map_err(failed)?;
    }
    spawn(name, move || {
        let mut events = Vec::with_capacity(4);
        loop {
            if wait(&poll, &mut events).is_err() {
                return;
            }
            for notify in transport.notify() {
                drain(notify);
            }
            step(&transport);
        }
    })
}

/// Starts a named thread.
pub(super) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), WorkerError> {
    let failed = |source| WorkerError::of(name, source);
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(failed)?;
    Ok(())
}

/// Waits for events without limit.
pub(super) fn wait(
    poll: &impl std::os::fd::AsFd,
    events: &mut Vec<epoll::Event>,
) -> Result<(), Errno> {
    events.clear();
    loop {
        match epoll::wait(poll, rustix::buffer::spare_capacity(events), None) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Forgets the notifications so far.
pub(super) fn drain(event: &EventFd) {
    // Nothing to read means that another round has handled it.
    let _count = event.read();
}
