//! virtio devices behind virtio-mmio, version 2. Source: Virtual I/O Device
//! (VIRTIO) Version 1.2.
//!
//! Every device has one thread that waits for notifications and touches guest
//! memory. What a queue contains comes from the guest and is not believed:
//! every length is bounded, and a queue that makes no sense stops its device
//! until the driver resets it.

mod balloon;
mod block;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod hostile;
mod net;
mod prefault;
mod rng;
mod segments;
#[cfg(any(test, feature = "fuzzing"))]
mod testing;
mod transport;
mod vsock;
mod worker;

pub(crate) use balloon::Balloon;
pub(crate) use block::{Block, BlockError, Disk, DiskError};
pub(crate) use net::Net;
pub(crate) use rng::Rng;
pub(crate) use transport::{Identity, Transport, TransportError, TransportState};
pub(crate) use vsock::{Vsock, VsockState};
pub(crate) use worker::WorkerError;
