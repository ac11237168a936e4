//! Looking ahead in a queue.
//!
//! After a restore, a ring or a buffer may be a page that has not arrived
//! yet. A device thread reads a byte of each such page before it asks for a
//! pass, so that it does not wait for remote bytes while it holds one.

use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::{Bytes, GuestAddress};

use super::transport::Transport;
use crate::memory::GuestMap;
use crate::protocol::PAGE_SIZE;

/// Descriptors looked at per chain.
const DESCRIPTORS_MAX: usize = 64;
/// Bytes looked at per descriptor.
const BYTES_MAX: u64 = 1 << 20;

impl Transport {
    /// Waits for the pages of the next `chains` chains of a queue and of its
    /// rings. Nothing is taken, and nothing that goes wrong matters here.
    pub(super) fn prefault(&self, queue: usize, chains: usize) {
        let Some(position) = self.position(queue).filter(|position| position.ready) else {
            return;
        };
        let memory = self.memory();
        let used = 8 * u64::from(position.size) + 6;
        touch(memory, position.used_ring, used);
        let Ok(mut ahead) = Queue::try_from(position) else { return };
        let Ok(next) = ahead.iter(memory) else { return };
        for chain in next.take(chains) {
            for descriptor in chain.take(DESCRIPTORS_MAX) {
                touch(memory, descriptor.addr().0, u64::from(descriptor.len()));
            }
        }
    }
}

/// Reads a byte of each page of `start..start + len`.
pub(super) fn touch(memory: &GuestMap, start: u64, len: u64) {
    let end = start.saturating_add(len.min(BYTES_MAX));
    let mut at = start;
    while at < end {
        if memory.read_obj::<u8>(GuestAddress(at)).is_err() {
            return;
        }
        at = (at / PAGE_SIZE + 1).saturating_mul(PAGE_SIZE);
    }
}
