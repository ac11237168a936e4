//! A driver for tests: it sets a device up through its registers and puts
//! chains, good and bad, into real guest memory.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::transport::{Identity, Transport};
use crate::devices::Gate;
use crate::memory::{Ram, RamLayout};

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Where the test's buffers start.
pub(super) const BUFFERS: u64 = 0x10_0000;

/// One descriptor: address, length, flags, next.
pub(super) type Descriptor = (u64, u32, u16, u16);

pub(super) struct Driver {
    pub(super) transport: Arc<Transport>,
    pub(super) gate: Arc<Gate>,
    pub(super) ram: Arc<Ram>,
    size: u16,
}

/// The register window, as the guest writes it.
pub(super) fn write(transport: &Transport, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}

pub(super) fn read(transport: &Transport, register: u64) -> u32 {
    let mut word = [0; 4];
    transport.read(register, &mut word);
    u32::from_le_bytes(word)
}

fn ring(queue: usize) -> u64 {
    0x1_0000 * (1 + queue as u64)
}

impl Driver {
    /// A device that a driver has set up without event indices, its gate open.
    pub(super) fn new(identity: Identity) -> Self {
        let ram = Arc::new(
            Ram::anonymous(RamLayout::new(16 << 20).expect("a test driver knows its memory"))
                .expect("a test driver knows its memory"),
        );
        let gate = Arc::new(Gate::closed());
        let size = 16;
        let transport = Transport::new(identity, Arc::clone(&ram), Arc::clone(&gate))
            .expect("a test driver knows its memory");
        gate.open();
        let driver = Self { transport: Arc::new(transport), gate, ram, size };
        driver.start();
        driver
    }

    pub(super) fn start(&self) {
        let transport = &self.transport;
        write(transport, 0x70, 3);
        write(transport, 0x24, 1);
        write(transport, 0x20, 1);
        write(transport, 0x70, 3 | 8);
        assert_eq!(read(transport, 0x70) & 8, 8, "the features are accepted");
        for queue in 0..transport.notify().len() {
            let at = u32::try_from(ring(queue)).expect("a test driver knows its memory");
            write(transport, 0x30, u32::try_from(queue).expect("a test driver knows its memory"));
            write(transport, 0x38, u32::from(self.size));
            write(transport, 0x80, at);
            write(transport, 0x90, at + 0x4000);
            write(transport, 0xa0, at + 0x8000);
            write(transport, 0x44, 1);
        }
        write(transport, 0x70, 3 | 8 | 4);
    }

    pub(super) fn describe(&self, queue: usize, index: u16, descriptor: Descriptor) {
        self.describe_at(ring(queue) + 16 * u64::from(index), descriptor);
    }

    pub(super) fn describe_at(&self, at: u64, (address, len, flags, next): Descriptor) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(at, &bytes);
    }

    /// Describes a chain from descriptor `head` on and makes it available.
    pub(super) fn offer(&self, queue: usize, head: u16, chain: &[(u64, u32, u16)]) {
        for (index, (address, len, flags)) in (head..).zip(chain) {
            let last = usize::from(index - head) + 1 == chain.len();
            let next = if last { 0 } else { NEXT };
            self.describe(queue, index, (*address, *len, flags | next, index + 1));
        }
        self.make_available(queue, head);
    }

    pub(super) fn make_available(&self, queue: usize, head: u16) {
        let index = self.available_index(queue);
        let slot = ring(queue) + 0x4004 + 2 * u64::from(index % self.size);
        self.put(slot, &head.to_le_bytes());
        self.set_available_index(queue, index.wrapping_add(1));
    }

    pub(super) fn available_index(&self, queue: usize) -> u16 {
        self.ram
            .guest()
            .read_obj(GuestAddress(ring(queue) + 0x4002))
            .expect("a test driver knows its memory")
    }

    pub(super) fn set_available_index(&self, queue: usize, index: u16) {
        self.put(ring(queue) + 0x4002, &index.to_le_bytes());
    }

    /// The used ring so far: heads and lengths.
    pub(super) fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let guest = self.ram.guest();
        let count: u16 = guest
            .read_obj(GuestAddress(ring(queue) + 0x8002))
            .expect("a test driver knows its memory");
        (0..u64::from(count))
            .map(|index| {
                let at = ring(queue) + 0x8004 + 8 * index;
                let head =
                    guest.read_obj(GuestAddress(at)).expect("a test driver knows its memory");
                (
                    head,
                    guest.read_obj(GuestAddress(at + 4)).expect("a test driver knows its memory"),
                )
            })
            .collect()
    }

    /// Writes what lies in memory.
    pub(super) fn try_put(&self, at: u64, bytes: &[u8]) {
        // A driver that describes what is no memory cannot write there.
        drop(self.ram.guest().write(bytes, GuestAddress(at)));
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.ram
            .guest()
            .write_slice(bytes, GuestAddress(at))
            .expect("a test driver knows its memory");
    }

    pub(super) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram
            .guest()
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("a test driver knows its memory");
        bytes
    }

    pub(super) fn needs_reset(&self) -> bool {
        read(&self.transport, 0x70) & 64 != 0
    }
}
