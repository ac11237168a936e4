//! virtio-net over a tap device, or whatever else gives and takes one frame
//! with its header a call.
//!
//! The guest may leave checksums and the cutting of long TCP segments to the
//! host; the host gives it only finished frames, so that any driver can take
//! them. Frames are lost where nobody has room for them, as on any network.
//! A frame that was being sent at the instant of a capture is sent again by
//! whoever continues from it; one that was being received is not.

mod thread;

#[cfg(any(test, feature = "fuzzing"))]
pub(super) use thread::Puppet;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::transport::{Identity, Transport};
use super::worker::WorkerError;

const QUEUE_RECEIVE: usize = 0;
const QUEUE_SEND: usize = 1;
/// `struct virtio_net_hdr_v1`, which precedes each frame in both directions.
const HEADER_LEN: usize = 12;
/// Longest frame: a TCP segment of 64 KiB with its headers.
const FRAME_LEN_MAX: usize = HEADER_LEN + 14 + 65535;

/// A network device.
#[derive(Debug)]
pub(crate) struct Net;

impl Net {
    /// What its driver sees.
    pub(crate) fn identity(mac: [u8; 6]) -> Identity {
        let features = 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6;
        let mut config = mac.to_vec();
        config.extend([VIRTIO_NET_S_LINK_UP.to_le_bytes()[0], 0]);
        Identity { device: VIRTIO_ID_NET, features, queues: &[256, 256], config }
    }

    /// Starts its thread. Reading and writing `link` must not block.
    pub(crate) fn start(
        name: &str,
        transport: Arc<Transport>,
        link: OwnedFd,
    ) -> Result<(), WorkerError> {
        thread::start(name, transport, link)
    }
}
