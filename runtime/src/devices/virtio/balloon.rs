//! virtio-balloon, for the sake of free page reporting: the guest tells of memory
//! that it does not use, which is neither kept nor stored from then on.
//!
//! The balloon itself is never blown up: its size is zero. A driver that puts
//! pages into it all the same frees them in the same way.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::segments::Buffers;
use super::transport::{Broken, Identity, Taken, Transport};
use super::worker::{WorkerError, serve};
use crate::memory::{Freed, GuestMap};
use crate::protocol::PAGE_SIZE;

/// Free page reporting; the bindings lack this header.
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

const QUEUE_INFLATE: usize = 0;
const QUEUE_DEFLATE: usize = 1;
/// Drivers number the queues of the features that they accept without gaps.
const QUEUE_REPORTING: usize = 2;

/// Page numbers that are taken from one request to inflate; Linux sends 256.
const NUMBERS_MAX: usize = 1024;
const NUMBER_LEN: usize = 4;
/// `num_pages` and `actual`.
const CONFIG_LEN: usize = 8;

/// The balloon.
#[derive(Debug)]
pub(crate) struct Balloon;

impl Balloon {
    /// What its driver sees.
    pub(crate) fn identity() -> Identity {
        Identity {
            device: VIRTIO_ID_BALLOON,
            features: 1 << VIRTIO_BALLOON_F_REPORTING,
            queues: &[64, 64, 64],
            config: vec![0; CONFIG_LEN],
        }
    }

    /// Starts its thread.
    pub(crate) fn start(transport: Arc<Transport>, freed: Arc<Freed>) -> Result<(), WorkerError> {
        serve("balloon", transport, move |transport| step(transport, &freed))
    }
}

pub(super) fn step(transport: &Transport, freed: &Freed) {
    for queue in [QUEUE_INFLATE, QUEUE_DEFLATE, QUEUE_REPORTING] {
        drain(transport, freed, queue);
    }
}

fn drain(transport: &Transport, freed: &Freed, queue: usize) {
    loop {
        // Only the rings: pages that are to go must not come in first.
        transport.prefault(queue, 0);
        let pass = transport.enter();
        let Some(Taken { ticket, chain }) = transport.take(&pass, queue) else { return };
        let done = Buffers::of(chain).and_then(|buffers| match queue {
            QUEUE_REPORTING => report(freed, &buffers),
            QUEUE_INFLATE => inflate(transport.memory(), freed, &buffers),
            _ => Ok(()),
        });
        match done {
            Ok(()) => transport.finish(&pass, ticket, 0),
            Err(broken) => return transport.fail(&pass, broken),
        }
    }
}

/// The buffers are the free memory itself.
fn report(freed: &Freed, buffers: &Buffers) -> Result<(), Broken> {
    let len = usize::try_from(buffers.writable.len()).unwrap_or(usize::MAX);
    buffers.writable.walk(0, len, |start, len| release(freed, start.0, len as u64))
}

/// The buffer is a list of page numbers.
fn inflate(memory: &GuestMap, freed: &Freed, buffers: &Buffers) -> Result<(), Broken> {
    let len = usize::try_from(buffers.readable.len()).unwrap_or(usize::MAX);
    let mut numbers = vec![[0; NUMBER_LEN]; (len / NUMBER_LEN).min(NUMBERS_MAX)];
    buffers.readable.read(memory, 0, numbers.as_flattened_mut())?;
    numbers.into_iter().try_for_each(|number| {
        release(freed, u64::from(u32::from_le_bytes(number)) * PAGE_SIZE, PAGE_SIZE)
    })
}

fn release(freed: &Freed, start: u64, len: u64) -> Result<(), Broken> {
    if freed.release(start, len) { Ok(()) } else { Err(Broken("freed memory lies outside memory")) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::devices::virtio::testing::{BUFFERS, Driver, WRITE};
    use crate::protocol::PageRun;
    use crate::sys::pagemap::Pagemap;

    fn balloon() -> (Driver, Freed) {
        let driver = Driver::new(Balloon::identity());
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let freed = Freed::new(Arc::clone(&driver.ram), Pagemap::new(pagemap.into()));
        (driver, freed)
    }

    #[test]
    fn reported_memory_is_freed() {
        let (driver, freed) = balloon();
        driver.put(BUFFERS, &[7; 16384]);
        driver.offer(2, 0, &[(BUFFERS, 4096, WRITE), (BUFFERS + 8192, 8192, WRITE)]);
        step(&driver.transport, &freed);
        assert_eq!(driver.used(2), [(0, 0)]);
        assert_eq!(
            driver.get(BUFFERS, 16384),
            [[0; 4096], [7; 4096], [0; 4096], [0; 4096]].concat()
        );
        let first = BUFFERS / 4096;
        let run = |first, count| PageRun { first, count };
        assert_eq!(freed.runs(), [run(first, 1), run(first + 2, 2)]);
    }

    #[test]
    fn inflated_pages_are_freed_and_deflated_ones_are_the_guests_again() {
        let (driver, freed) = balloon();
        let page = BUFFERS + (1 << 20);
        driver.put(page, &[7; 4096]);
        let number = u32::try_from(page / 4096).unwrap();
        driver.put(BUFFERS, &number.to_le_bytes());
        for queue in [0, 1] {
            driver.offer(queue, 0, &[(BUFFERS, 4, 0)]);
            step(&driver.transport, &freed);
            assert_eq!(driver.used(queue), [(0, 0)]);
            assert_eq!(driver.get(page, 4096), [0; 4096]);
            driver.put(page, &[8; 4096]);
            step(&driver.transport, &freed);
            assert_eq!(driver.get(page, 4096), [8; 4096]);
            driver.put(page, &[0; 4096]);
        }
    }

    #[test]
    fn memory_that_is_none_stops_the_device() {
        for bad in [(u64::MAX - 10, 64), (64 << 20, 4096)] {
            let (driver, freed) = balloon();
            driver.offer(2, 0, &[(bad.0, bad.1, WRITE)]);
            step(&driver.transport, &freed);
            assert!(driver.needs_reset());
            assert!(freed.runs().is_empty());
        }
        let (driver, freed) = balloon();
        driver.put(BUFFERS, &u32::MAX.to_le_bytes());
        driver.offer(0, 0, &[(BUFFERS, 4, 0)]);
        step(&driver.transport, &freed);
        assert!(driver.needs_reset());
    }
}
