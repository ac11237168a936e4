//! The virtio-mmio register window and the queues behind it.
//!
//! One per device, shared by the vCPU threads, which access registers, and
//! the device's thread, which takes chains from queues and gives them back.
//! A chain that was taken and not given back is *unfinished*: the saved state
//! has it still in the queue, so whoever continues from it executes it again.
//! Chains of a queue are finished in the order in which they were taken.

use std::io;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

mod registers;
mod state;
#[cfg(test)]
mod tests;

pub(crate) use state::{TransportError, TransportState};

use super::super::gate::{Gate, Pass};
use crate::memory::{GuestMap, Ram};

/// What a device tells its driver.
#[derive(Debug)]
pub(crate) struct Identity {
    /// Device type, from the list in the specification.
    pub(crate) device: u32,
    /// Features of the device type.
    pub(crate) features: u64,
    /// Sizes of its queues.
    pub(crate) queues: &'static [u16],
    /// Its configuration space.
    pub(crate) config: Vec<u8>,
}

/// A queue's contents make no sense, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Broken(pub(super) &'static str);

const STATUS_FEATURES_OK: u32 = 8;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_NEEDS_RESET: u32 = 64;
const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

#[derive(Debug)]
struct Ring {
    queue: Queue,
    unfinished: u16,
}

#[derive(Debug)]
struct Common {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    interrupt_status: u32,
    rings: Vec<Ring>,
    /// Counts the resets by the driver.
    epoch: u64,
}

/// A chain that the device has taken.
#[derive(Debug)]
pub(super) struct Taken<'a> {
    /// Gives it back.
    pub(super) ticket: Ticket,
    /// Its descriptors.
    pub(super) chain: DescriptorChain<&'a GuestMap>,
}

/// Names a taken chain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    queue: usize,
    head: u16,
    epoch: u64,
}

/// One device's window.
#[derive(Debug)]
pub(crate) struct Transport {
    identity: Identity,
    ram: Arc<Ram>,
    gate: Arc<Gate>,
    interrupt: EventFd,
    notify: Vec<EventFd>,
    common: Mutex<Common>,
}

impl Transport {
    /// A device after reset.
    pub(crate) fn new(identity: Identity, ram: Arc<Ram>, gate: Arc<Gate>) -> io::Result<Self> {
        let mut rings = Vec::new();
        let mut notify = Vec::new();
        for size in identity.queues {
            let queue = Queue::new(*size).map_err(io::Error::other)?;
            rings.push(Ring { queue, unfinished: 0 });
            notify.push(EventFd::new(EFD_NONBLOCK)?);
        }
        let common = Mutex::new(Common {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            interrupt_status: 0,
            rings,
            epoch: 0,
        });
        let interrupt = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self { identity, ram, gate, interrupt, notify, common })
    }

    /// Signalled for each interrupt.
    pub(crate) fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Signalled when the driver notifies a queue, in the order of queues.
    pub(crate) fn notify(&self) -> &[EventFd] {
        &self.notify
    }

    /// Wakes the device's thread for every queue.
    pub(crate) fn wake(&self) {
        for notify in &self.notify {
            signal(notify);
        }
    }

    /// Guest memory.
    pub(super) fn memory(&self) -> &GuestMap {
        self.ram.guest()
    }

    /// Waits until the machine may change.
    pub(super) fn enter(&self) -> Pass<'_> {
        self.gate.enter()
    }

    /// How often the driver has reset the device.
    pub(super) fn epoch(&self) -> u64 {
        self.common().epoch
    }

    /// Whether the driver uses the device.
    pub(super) fn active(&self) -> bool {
        self.common().active()
    }

    /// Takes the next chain of a queue. With none left, asks the driver to
    /// notify the next one.
    pub(super) fn take(&self, _pass: &Pass<'_>, queue: usize) -> Option<Taken<'_>> {
        let memory = self.memory();
        let mut common = self.common();
        if !common.active() {
            return None;
        }
        let epoch = common.epoch;
        let taken = common.rings[queue].take(memory);
        match taken {
            Ok(chain) => chain.map(|chain| Taken {
                ticket: Ticket { queue, head: chain.head_index(), epoch },
                chain,
            }),
            Err(broken) => {
                self.break_down(&mut common, broken);
                None
            }
        }
    }

    /// Gives a chain back with `written` bytes in its writable buffers, and
    /// interrupts the driver if it wants that. A chain from before a reset is
    /// forgotten.
    pub(super) fn finish(&self, _pass: &Pass<'_>, ticket: Ticket, written: u32) {
        let memory = self.memory();
        let mut common = self.common();
        if common.epoch != ticket.epoch || !common.active() {
            return;
        }
        let ring = &mut common.rings[ticket.queue];
        ring.unfinished = ring.unfinished.saturating_sub(1);
        let wanted = ring
            .queue
            .add_used(memory, ticket.head, written)
            .and_then(|()| ring.queue.needs_notification(memory));
        match wanted {
            Ok(true) => self.interrupt_with(&mut common, INTERRUPT_USED),
            Ok(false) => {}
            Err(_) => self.break_down(&mut common, Broken("the used ring lies outside memory")),
        }
    }

    /// Leaves the chain that was taken last for later.
    pub(super) fn put_back(&self, _pass: &Pass<'_>, ticket: Ticket) {
        let mut common = self.common();
        if common.epoch == ticket.epoch {
            let ring = &mut common.rings[ticket.queue];
            ring.queue.go_to_previous_position();
            ring.unfinished = ring.unfinished.saturating_sub(1);
        }
    }

    /// Asks the driver to notify when it adds a chain to those that are there
    /// already, taken or not, and returns the available index that it would
    /// move on from.
    pub(super) fn notify_when_more(&self, _pass: &Pass<'_>, queue: usize) -> Result<u16, Broken> {
        let outside = |_| Broken("a queue lies outside memory");
        let memory = self.memory();
        let common = self.common();
        let ring = &common.rings[queue].queue;
        if !ring.ready() {
            return Ok(0);
        }
        let available = || -> Result<u16, Broken> {
            let index = ring.avail_idx(memory, Ordering::Acquire);
            Ok(index.map_err(|_| Broken("a queue lies outside memory"))?.0)
        };
        if ring.event_idx_enabled() {
            // The avail_event field ends the used ring.
            let at = ring.used_ring().saturating_add(4 + 8 * u64::from(ring.size()));
            memory
                .store(available()?.to_le(), GuestAddress(at), Ordering::Relaxed)
                .map_err(outside)?;
            fence(Ordering::SeqCst);
        }
        available()
    }

    /// Whether the driver has reset the device since the chain was taken.
    pub(super) fn is_stale(&self, ticket: Ticket) -> bool {
        self.common().epoch != ticket.epoch
    }

    /// Stops the device until the driver resets it.
    pub(super) fn fail(&self, _pass: &Pass<'_>, broken: Broken) {
        self.break_down(&mut self.common(), broken);
    }

    /// A copy of a queue's position, for looking ahead without taking.
    pub(super) fn position(&self, queue: usize) -> Option<QueueState> {
        let common = self.common();
        common.active().then(|| common.rings[queue].queue.state())
    }

    fn break_down(&self, common: &mut Common, broken: Broken) {
        tracing::warn!("virtio device {}: {broken}; it waits for a reset", self.identity.device);
        common.status |= STATUS_NEEDS_RESET;
        self.interrupt_with(common, INTERRUPT_CONFIG);
    }

    fn interrupt_with(&self, common: &mut Common, cause: u32) {
        common.interrupt_status |= cause;
        signal(&self.interrupt);
    }

    fn features(&self) -> u64 {
        self.identity.features | COMMON_FEATURES
    }

    fn common(&self) -> MutexGuard<'_, Common> {
        // A panic of another thread ends the machine; until then the
        // registers stay readable.
        self.common.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Common {
    fn active(&self) -> bool {
        self.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK
    }
}

impl Ring {
    fn take<'a>(
        &mut self,
        memory: &'a GuestMap,
    ) -> Result<Option<DescriptorChain<&'a GuestMap>>, Broken> {
        let outside = |_| Broken("a queue lies outside memory");
        if !self.queue.ready() {
            return Ok(None);
        }
        loop {
            let next = self
                .queue
                .iter(memory)
                .map_err(|_| Broken("the available ring is ahead of its queue"))?
                .next();
            if let Some(chain) = next {
                if chain.head_index() >= self.queue.size() {
                    return Err(Broken("a chain starts outside its table"));
                }
                self.unfinished += 1;
                return Ok(Some(chain));
            }
            if !self.queue.enable_notification(memory).map_err(outside)? {
                return Ok(None);
            }
        }
    }
}

/// Counts one more event; a full counter is pending already.
fn signal(event: &EventFd) {
    if let Err(error) = event.write(1)
        && error.kind() != io::ErrorKind::WouldBlock
    {
        tracing::warn!("eventfd: {error}");
    }
}
