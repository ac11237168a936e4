//! virtio-vsock in user space: streams from the host to guest ports.
//!
//! The host side of a connection is a stream socket that the supervisor
//! hands over. The guest cannot call the host: nothing listens there.
//!
//! A machine that continues from a saved state starts without connections.
//! If there were some, the guest is told by a transport reset, and new
//! connections wait until it has heard: the driver gives the event's buffer
//! back only after it has reset its sockets, so a new one is not among them.

mod connection;
mod mux;
mod packet;
mod thread;

#[cfg(any(test, feature = "fuzzing"))]
pub(super) use thread::Puppet;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::mux::Mux;
use super::transport::{Identity, Transport};
use super::worker::WorkerError;

const QUEUE_RECEIVE: usize = 0;
const QUEUE_SEND: usize = 1;
const QUEUE_EVENT: usize = 2;

/// What must survive of the device besides its queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VsockState {
    next_port: u32,
    /// The guest may believe in connections that do not exist any more.
    stale_connections: bool,
}

/// Where a transport reset stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reset {
    /// The guest's view and ours agree.
    None,
    /// To be sent.
    Due,
    /// Sent; done once the driver has given the event queue a buffer more.
    Sent {
        /// The available index at that time.
        available: u16,
    },
}

#[derive(Debug)]
struct Shared {
    mux: Mux,
    reset: Reset,
    /// Streams that the device's thread has not taken yet.
    calls: Vec<(UnixStream, u32)>,
}

/// The device as the rest of the machine uses it.
#[derive(Debug)]
pub(crate) struct Vsock {
    shared: Arc<Mutex<Shared>>,
    called: Arc<EventFd>,
}

impl Vsock {
    /// What its driver sees.
    pub(crate) fn identity() -> Identity {
        Identity {
            device: VIRTIO_ID_VSOCK,
            features: 0,
            queues: &[128, 128, 16],
            config: packet::GUEST_CID.to_le_bytes().to_vec(),
        }
    }

    /// Starts its thread, from a saved state if there is one.
    pub(crate) fn start(
        transport: Arc<Transport>,
        saved: Option<&VsockState>,
    ) -> Result<Self, WorkerError> {
        let stale = saved.is_some_and(|saved| saved.stale_connections);
        let shared = Arc::new(Mutex::new(Shared {
            mux: Mux::new(saved.map_or(0, |saved| saved.next_port)),
            reset: if stale { Reset::Due } else { Reset::None },
            calls: Vec::new(),
        }));
        let called = EventFd::new(EFD_NONBLOCK).map_err(|error| WorkerError::of("vsock", error))?;
        let called = Arc::new(called);
        thread::start(transport, Arc::clone(&shared), Arc::clone(&called))?;
        Ok(Self { shared, called })
    }

    /// Serves `stream` as a connection to a guest port from now on.
    pub(crate) fn connect(&self, stream: UnixStream, port: u32) -> io::Result<()> {
        lock(&self.shared).calls.push((stream, port));
        self.called.write(1)
    }

    /// The state of the parked device.
    pub(crate) fn save(&self) -> VsockState {
        let shared = lock(&self.shared);
        VsockState {
            next_port: shared.mux.next_port(),
            stale_connections: shared.mux.len() > 0 || shared.reset != Reset::None,
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // A panic on the device's thread ends the process.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
