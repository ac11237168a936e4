//! virtio-blk over a pool and overlays.
//!
//! Requests are executed one after the other by the device's thread. Reading
//! may wait for the page server and happens without a pass; completing a
//! request, and writing to the overlay, happens with one.

mod disk;
mod erase;
mod overlay;
mod request;

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub(crate) use disk::{Disk, DiskError};

use self::erase::{RANGES_MAX, SECTORS_MAX};
use self::request::execute;
use super::segments::Buffers;
use super::transport::{Identity, Taken, Transport};
use super::worker::{WorkerError, serve};

/// Why a disk cannot be offered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlockError {
    /// Its length is no number of sectors.
    #[error("a disk of {0} bytes: the length must be a multiple of 512 and not zero")]
    Length(u64),
}

const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Buffers per request, leaving room for the header and the status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Images come with partition tables and file systems made for 512-byte
/// sectors; whole pages are what is cheap, which the topology says.
const LOGICAL_BLOCK: u32 = 512;
const SECTORS_PER_PAGE_EXPONENT: u8 = 3;
const SECTORS_PER_PAGE: u16 = 8;

/// A block device.
#[derive(Debug)]
pub(crate) struct Block;

impl Block {
    /// What its driver sees.
    pub(crate) fn identity(len: u64, read_only: bool) -> Result<Identity, BlockError> {
        if len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(BlockError::Length(len));
        }
        let mut features = 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_TOPOLOGY;
        features |= if read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        Ok(Identity {
            device: VIRTIO_ID_BLOCK,
            features,
            queues: &[QUEUE_SIZE],
            config: config(len / SECTOR),
        })
    }

    /// Starts its thread.
    pub(crate) fn start(
        name: &str,
        transport: Arc<Transport>,
        disk: Arc<Disk>,
    ) -> Result<(), WorkerError> {
        serve(name, transport, move |transport| step(transport, &disk))
    }
}

/// struct virtio_blk_config, as far as the features reach.
fn config(sectors: u64) -> Vec<u8> {
    let mut config = sectors.to_le_bytes().to_vec();
    // size_max and geometry are not offered.
    config.extend(0u32.to_le_bytes());
    config.extend(SEGMENTS_MAX.to_le_bytes());
    config.extend(0u32.to_le_bytes());
    config.extend(LOGICAL_BLOCK.to_le_bytes());
    // Physical block, alignment, smallest and best transfer.
    config.extend([SECTORS_PER_PAGE_EXPONENT, 0]);
    config.extend(SECTORS_PER_PAGE.to_le_bytes());
    config.extend(u32::from(SECTORS_PER_PAGE).to_le_bytes());
    // Write-back cache, a spare byte, number of queues: not offered.
    config.extend([0; 4]);
    // Discard: sectors, ranges, alignment. Write zeroes: sectors, ranges, and
    // that it gives space back.
    config.extend(SECTORS_MAX.to_le_bytes());
    config.extend(RANGES_MAX.to_le_bytes());
    config.extend(u32::from(SECTORS_PER_PAGE).to_le_bytes());
    config.extend(SECTORS_MAX.to_le_bytes());
    config.extend(RANGES_MAX.to_le_bytes());
    config.extend([1, 0, 0, 0]);
    config
}

#[cfg(any(test, feature = "fuzzing"))]
/// The device without a thread, for those who play its driver.
pub(super) struct Puppet(Disk);

#[cfg(any(test, feature = "fuzzing"))]
impl Puppet {
    const LEN: u64 = 128 << 10;

    /// A small disk of which the first half has data.
    pub(super) fn new(read_only: bool) -> (Identity, Self) {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = |name: &str| {
            let file = std::fs::File::from(rustix::fs::memfd_create(name, flags).expect("a memfd"));
            file.set_len(Self::LEN).expect("room");
            file
        };
        let (pool, overlay) = (file("pool"), file("overlay"));
        let half = vec![7; usize::try_from(Self::LEN / 2).expect("it is small")];
        std::os::unix::fs::FileExt::write_all_at(&pool, &half, 0).expect("room");
        let identity = Block::identity(Self::LEN, read_only).expect("whole sectors");
        let disk = Disk::new(Self::LEN, read_only, &pool, overlay, Vec::new()).expect("a disk");
        (identity, Self(disk))
    }

    pub(super) fn step(&self, transport: &Transport) {
        step(transport, &self.0);
    }
}

fn step(transport: &Transport, disk: &Disk) {
    loop {
        transport.prefault(0, 1);
        let pass = transport.enter();
        let Some(Taken { ticket, chain }) = transport.take(&pass, 0) else { return };
        drop(pass);
        let executed =
            Buffers::of(chain).and_then(|buffers| execute(transport, disk, ticket, &buffers));
        if let Err(broken) = executed {
            let pass = transport.enter();
            return transport.fail(&pass, broken);
        }
    }
}
