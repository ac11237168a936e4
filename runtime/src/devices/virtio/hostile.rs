//! A driver that does whatever a fuzzer says: arbitrary registers, guest memory,
//! chains and indices, against the real device behind the real queue.
//!
//! The input is a program. Each instruction is a byte and its operands; what is
//! missing at the end is zero. The device is set up properly before, so that even
//! short programs reach it; programs can undo that.

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use super::balloon::{self, Balloon};
use super::block::Puppet as Block;
use super::net::{Net, Puppet as NetPuppet};
use super::rng::{self, Rng};
use super::testing::{BUFFERS, Descriptor, Driver, write};
use super::transport::TransportState;
use super::vsock::Puppet as Vsock;
use crate::memory::Freed;
use crate::sys::pagemap::Pagemap;

/// Instructions that are executed; a program of 64 KiB has more.
const STEPS_MAX: usize = 512;
/// The device's status register: zero resets it.
const STATUS: u64 = 0x70;
/// Descriptors of one chain.
const CHAIN_MAX: usize = 8;

/// A device that a program is played against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    /// A disk.
    Block,
    /// A disk that may only be read.
    ReadOnlyBlock,
    /// A network device with a link.
    Net,
    /// Streams, with a host that calls and writes.
    Vsock,
    /// Entropy.
    Rng,
    /// The balloon.
    Balloon,
}

/// What acts when the driver notifies, and what the host may do beside it.
enum Behind {
    Block(Block),
    Net(NetPuppet),
    Vsock(Vsock),
    Rng,
    Balloon(Freed),
}

impl Device {
    fn set_up(self) -> (Driver, Behind) {
        match self {
            Self::Block | Self::ReadOnlyBlock => {
                let (identity, block) = Block::new(self == Self::ReadOnlyBlock);
                (Driver::new(identity), Behind::Block(block))
            }
            Self::Net => {
                let driver = Driver::new(Net::identity([2, 0, 0, 0, 0, 1]));
                let (ours, theirs) = UnixDatagram::pair().expect("two sockets");
                let puppet = NetPuppet::new(&driver.transport, ours, theirs);
                (driver, Behind::Net(puppet))
            }
            Self::Vsock => {
                let driver = Driver::new(super::Vsock::identity());
                let puppet = Vsock::new(&driver.transport);
                (driver, Behind::Vsock(puppet))
            }
            Self::Rng => (Driver::new(Rng::identity()), Behind::Rng),
            Self::Balloon => {
                let driver = Driver::new(Balloon::identity());
                let pagemap = std::fs::File::open("/proc/self/pagemap").expect("a page map");
                let freed = Freed::new(Arc::clone(&driver.ram), Pagemap::new(pagemap.into()));
                (driver, Behind::Balloon(freed))
            }
        }
    }

    /// Plays a program. What the guest does to itself does not matter; that this
    /// returns does.
    pub(crate) fn play(self, program: &[u8]) {
        let (driver, mut behind) = self.set_up();
        let mut program = Program { left: program };
        for _ in 0..STEPS_MAX {
            if program.left.is_empty() {
                break;
            }
            perform(&driver, &mut behind, &mut program);
        }
        behind.step(&driver);
        // Whatever was done, the device can be described and set up again.
        let saved = postcard::to_stdvec(&driver.transport.save()).expect("a state is stored");
        drop(postcard::from_bytes::<TransportState>(&saved).expect("and read"));
        write(&driver.transport, STATUS, 0);
        driver.start();
        behind.step(&driver);
    }
}

impl Behind {
    fn step(&mut self, driver: &Driver) {
        let transport = &driver.transport;
        match self {
            Self::Block(block) => block.step(transport),
            Self::Net(net) => net.step(),
            Self::Vsock(vsock) => vsock.step(),
            Self::Rng => rng::step(transport),
            Self::Balloon(freed) => balloon::step(transport, freed),
        }
    }

    /// Something happens on the host's side.
    fn host(&mut self, what: u8, bytes: &[u8]) {
        match self {
            Self::Net(net) => net.send(bytes),
            Self::Vsock(vsock) => vsock.host(what, bytes),
            Self::Block(_) | Self::Rng | Self::Balloon(_) => {}
        }
    }
}

struct Program<'a> {
    left: &'a [u8],
}

impl<'a> Program<'a> {
    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, left) = self.left.split_at(count.min(self.left.len()));
        self.left = left;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Mostly near the buffers, so that what is described is also written.
    fn address(&mut self) -> u64 {
        match self.byte() {
            kind @ 0..=199 => BUFFERS + u64::from(self.half()) + (u64::from(kind) << 12),
            200..=239 => u64::from(self.word()),
            _ => u64::from_le_bytes(self.array()),
        }
    }

    fn len(&mut self) -> u32 {
        match self.byte() {
            0..=239 => u32::from(self.half()),
            _ => self.word(),
        }
    }
}

fn perform(driver: &Driver, behind: &mut Behind, program: &mut Program<'_>) {
    let queues = driver.transport.notify().len();
    match program.byte() % 10 {
        0 => write(&driver.transport, u64::from(program.byte()) * 4, program.word()),
        1 => {
            let mut data = [0; 8];
            let len = usize::from(program.byte() % 9);
            driver.transport.read(u64::from(program.half()), &mut data[..len]);
            driver.transport.write(u64::from(program.half()), &data[..len]);
        }
        2 => {
            let at = program.address();
            let len = usize::from(program.byte());
            driver.try_put(at, program.bytes(len));
        }
        3 | 4 => offer(driver, usize::from(program.byte()) % queues, program),
        5 => driver.set_available_index(usize::from(program.byte()) % queues, program.half()),
        6 => driver.make_available(usize::from(program.byte()) % queues, program.half()),
        7 => {
            let (what, len) = (program.byte(), usize::from(program.half()));
            behind.host(what, program.bytes(len));
        }
        _ => behind.step(driver),
    }
}

/// A chain; the last descriptor may go on anywhere, also in a circle.
fn offer(driver: &Driver, queue: usize, program: &mut Program<'_>) {
    let count = usize::from(program.byte()) % CHAIN_MAX + 1;
    let head = program.half() % 16;
    for index in (head..).take(count) {
        let (address, len) = (program.address(), program.len());
        let flags = u16::from(program.byte());
        let next = match flags & 0x80 {
            0 => index + 1,
            _ => program.half(),
        };
        let descriptor: Descriptor = (address, len, flags & 0x7f, next);
        driver.describe(queue, index % 16, descriptor);
    }
    driver.make_available(queue, head);
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAMS: u64 = 400;

    /// A cheap source of programs, the same each time.
    fn random(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn random_programs_hurt_no_device() {
        let all = [
            Device::Block,
            Device::ReadOnlyBlock,
            Device::Net,
            Device::Vsock,
            Device::Rng,
            Device::Balloon,
        ];
        for device in all {
            for seed in 0..PROGRAMS {
                device.play(&random(seed, 40 + usize::from(seed.to_le_bytes()[0]) * 8));
            }
            device.play(&[]);
        }
        eprintln!("tried: {PROGRAMS} programs on each of {} virtio devices", all.len());
    }
}
