//! A transport's registers and queues, saved and given back.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

use super::{Common, Ring, Transport, signal};

/// Everything that a driver has set up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TransportState {
    device: u32,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    interrupt_status: u32,
    queues: Vec<SavedQueue>,
}

/// One queue; unfinished chains are still in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    max_size: u16,
    size: u16,
    ready: bool,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

/// Why a saved transport does not fit.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransportError {
    /// Another device or another version of it.
    #[error("virtio device {device}: {field} is {saved} in the saved state, {here} here")]
    Differs {
        /// Device type.
        device: u32,
        /// What differs.
        field: &'static str,
        /// Saved value.
        saved: u64,
        /// This machine's value.
        here: u64,
    },
    /// A queue that no driver can have set up.
    #[error("virtio device {device}: saved queue {queue} is not valid")]
    Queue {
        /// Device type.
        device: u32,
        /// Index of the queue.
        queue: usize,
    },
}

impl Transport {
    /// The state of a parked device.
    pub(crate) fn save(&self) -> TransportState {
        let common = self.common();
        TransportState {
            device: self.identity.device,
            status: common.status,
            device_features_select: common.device_features_select,
            driver_features_select: common.driver_features_select,
            driver_features: common.driver_features,
            queue_select: common.queue_select,
            interrupt_status: common.interrupt_status,
            queues: common.rings.iter().map(saved_queue).collect(),
        }
    }

    /// Sends an interrupt again that may have been on its way when the machine
    /// was saved: KVM delivers them from a work queue, which is not saved. A
    /// driver ignores one too many. To be called when the interrupt controllers
    /// have their state, which would overwrite it.
    pub(crate) fn send_interrupt_again(&self) {
        if self.common().interrupt_status != 0 {
            signal(&self.interrupt);
        }
    }

    /// Continues from a saved state. Work that was pending is looked for when
    /// the gate opens.
    pub(crate) fn restore(&self, state: &TransportState) -> Result<(), TransportError> {
        self.check(state)?;
        let mut common = self.common();
        let mut rings = Vec::new();
        for (index, saved) in state.queues.iter().enumerate() {
            let invalid = TransportError::Queue { device: self.identity.device, queue: index };
            let Ok(queue) = Queue::try_from(queue_state(saved)) else { return Err(invalid) };
            if queue.ready() && !queue.is_valid(self.memory()) {
                return Err(invalid);
            }
            rings.push(Ring { queue, unfinished: 0 });
        }
        *common = Common {
            status: state.status,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            interrupt_status: state.interrupt_status,
            rings,
            epoch: 0,
        };
        self.wake();
        Ok(())
    }

    fn check(&self, state: &TransportState) -> Result<(), TransportError> {
        let device = self.identity.device;
        let differs = |field, saved: u64, here: u64| {
            if saved == here {
                Ok(())
            } else {
                Err(TransportError::Differs { device, field, saved, here })
            }
        };
        differs("the device type", state.device.into(), device.into())?;
        differs("the number of queues", state.queues.len() as u64, self.notify.len() as u64)?;
        for (saved, size) in state.queues.iter().zip(self.identity.queues) {
            differs("the size of a queue", saved.max_size.into(), (*size).into())?;
        }
        let unknown = state.driver_features & !self.features();
        differs("the set of features that are not offered", unknown, 0)
    }
}

fn saved_queue(ring: &Ring) -> SavedQueue {
    let state = ring.queue.state();
    SavedQueue {
        max_size: state.max_size,
        size: state.size,
        ready: state.ready,
        event_idx: state.event_idx_enabled,
        next_avail: state.next_avail.wrapping_sub(ring.unfinished),
        next_used: state.next_used,
        desc_table: state.desc_table,
        avail_ring: state.avail_ring,
        used_ring: state.used_ring,
    }
}

fn queue_state(saved: &SavedQueue) -> QueueState {
    QueueState {
        max_size: saved.max_size,
        next_avail: saved.next_avail,
        next_used: saved.next_used,
        event_idx_enabled: saved.event_idx,
        size: saved.size,
        ready: saved.ready,
        desc_table: saved.desc_table,
        avail_ring: saved.avail_ring,
        used_ring: saved.used_ring,
    }
}
