//! virtio-rng: entropy from the host. Every request asks the host anew, but a
//! Linux driver asks ahead: the first bytes that a continued guest reads are
//! those that its original had asked for, so they are equal in all forks.
//! Whoever needs fork-unique bytes at once must get them another way.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::segments::Buffers;
use super::transport::{Broken, Identity, Taken, Transport};
use super::worker::{WorkerError, serve};

/// Bytes given at once; the driver asks again.
const BYTES_MAX: u64 = 4096;

/// The entropy device.
#[derive(Debug)]
pub(crate) struct Rng;

impl Rng {
    /// What its driver sees.
    pub(crate) fn identity() -> Identity {
        Identity { device: VIRTIO_ID_RNG, features: 0, queues: &[64], config: Vec::new() }
    }

    /// Starts its thread.
    pub(crate) fn start(transport: Arc<Transport>) -> Result<(), WorkerError> {
        serve("rng", transport, step)
    }
}

pub(super) fn step(transport: &Transport) {
    loop {
        transport.prefault(0, 1);
        let pass = transport.enter();
        let Some(Taken { ticket, chain }) = transport.take(&pass, 0) else { return };
        let filled = Buffers::of(chain).and_then(|buffers| fill(transport, &buffers));
        match filled {
            Ok(written) => transport.finish(&pass, ticket, written),
            Err(broken) => return transport.fail(&pass, broken),
        }
    }
}

fn fill(transport: &Transport, buffers: &Buffers) -> Result<u32, Broken> {
    let len = u32::try_from(buffers.writable.len().min(BYTES_MAX)).unwrap_or(0);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    let mut filled = 0;
    while filled < bytes.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        match rustix::rand::getrandom(&mut bytes[filled..], flags) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return Err(Broken("the host has no entropy")),
        }
    }
    buffers.writable.write(transport.memory(), 0, &bytes)?;
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::testing::{BUFFERS, Driver, WRITE};

    #[test]
    fn buffers_are_filled_and_never_more_than_a_page() {
        let driver = Driver::new(Rng::identity());
        driver.offer(0, 0, &[(BUFFERS, 64, WRITE)]);
        driver.offer(0, 1, &[(BUFFERS + 64, 1 << 20, WRITE)]);
        driver.offer(0, 2, &[(0, 0, WRITE)]);
        step(&driver.transport);
        assert_eq!(driver.used(0), [(0, 64), (1, 4096), (2, 0)]);
        assert_ne!(driver.get(BUFFERS, 64), [0; 64]);
        assert_eq!(driver.get(BUFFERS + 64 + 4096, 64), [0; 64]);
    }

    #[test]
    fn a_buffer_outside_memory_stops_the_device() {
        let driver = Driver::new(Rng::identity());
        driver.offer(0, 0, &[(u64::MAX - 10, 64, WRITE)]);
        step(&driver.transport);
        assert!(driver.needs_reset());
        assert_eq!(driver.used(0), []);
    }
}
