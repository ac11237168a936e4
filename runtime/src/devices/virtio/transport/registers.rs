//! The registers as the guest accesses them.

use virtio_queue::QueueT;

use super::{
    Broken, Common, INTERRUPT_USED, STATUS_DRIVER_OK, STATUS_FEATURES_OK, STATUS_NEEDS_RESET,
    Transport, signal,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "COPP"
const VENDOR: u32 = 0x5050_4f43;

const MAGIC_VALUE: u64 = 0x00;
const VERSION_NUMBER: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const VENDOR_ID: u64 = 0x0c;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
/// Where drivers notify queues; also caught by KVM's ioeventfds.
pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS_LOW: u64 = 0x80;
const QUEUE_DESCRIPTORS_HIGH: u64 = 0x84;
const QUEUE_DRIVER_LOW: u64 = 0x90;
const QUEUE_DRIVER_HIGH: u64 = 0x94;
const QUEUE_DEVICE_LOW: u64 = 0xa0;
const QUEUE_DEVICE_HIGH: u64 = 0xa4;
const SHARED_MEMORY: std::ops::RangeInclusive<u64> = 0xb0..=0xbc;
const CONFIG: u64 = 0x100;

impl Transport {
    /// Offset of the notification register, for ioeventfds.
    pub(crate) const NOTIFY_OFFSET: u64 = QUEUE_NOTIFY;

    /// The guest reads at `offset` in the window.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG) {
            self.read_config(at, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    /// The guest writes at `offset` in the window. The configuration spaces
    /// of these devices are read-only.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn read_config(&self, at: u64, data: &mut [u8]) {
        let start = usize::try_from(at).unwrap_or(usize::MAX);
        let tail = self.identity.config.get(start..).unwrap_or_default();
        let len = tail.len().min(data.len());
        data[..len].copy_from_slice(&tail[..len]);
    }

    fn read_register(&self, offset: u64) -> u32 {
        let common = self.common();
        let ring = common.selected().map(|index| &common.rings[index].queue);
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION_NUMBER => VERSION,
            DEVICE_ID => self.identity.device,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(self.features(), common.device_features_select),
            QUEUE_SIZE_MAX => ring.map_or(0, |queue| u32::from(queue.max_size())),
            QUEUE_READY => ring.map_or(0, |queue| u32::from(queue.ready())),
            INTERRUPT_STATUS => common.interrupt_status,
            STATUS => common.status,
            offset if SHARED_MEMORY.contains(&offset) => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let mut common = self.common();
        match offset {
            DEVICE_FEATURES_SELECT => common.device_features_select = value,
            DRIVER_FEATURES_SELECT => common.driver_features_select = value,
            DRIVER_FEATURES => common.accept_features(value),
            QUEUE_SELECT => common.queue_select = value,
            QUEUE_NOTIFY => {
                let queue = usize::try_from(value).unwrap_or(usize::MAX);
                if let Some(notify) = self.notify.get(queue) {
                    signal(notify);
                }
            }
            INTERRUPT_ACK => common.interrupt_status &= !value,
            STATUS => self.write_status(&mut common, value),
            _ => self.write_queue(&mut common, offset, value),
        }
    }

    fn write_queue(&self, common: &mut Common, offset: u64, value: u32) {
        let Some(index) = common.selected() else { return };
        if common.status & STATUS_DRIVER_OK != 0 {
            // A live queue cannot be moved.
            return;
        }
        let queue = &mut common.rings[index].queue;
        match offset {
            QUEUE_SIZE => {
                // A size that is no power of two leaves the old one, and the
                // driver with a queue that does not work.
                queue.set_size(u16::try_from(value).unwrap_or(0));
            }
            QUEUE_DESCRIPTORS_LOW => queue.set_desc_table_address(Some(value), None),
            QUEUE_DESCRIPTORS_HIGH => queue.set_desc_table_address(None, Some(value)),
            QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            QUEUE_READY => {
                queue.set_ready(value == 1);
                if value == 1 && !queue.is_valid(self.memory()) {
                    queue.set_ready(false);
                    self.break_down(common, Broken("a queue lies outside memory"));
                }
            }
            _ => {}
        }
    }

    fn write_status(&self, common: &mut Common, value: u32) {
        if value == 0 {
            common.reset();
            self.wake();
            return;
        }
        let new = value & !common.status;
        let mut value = value | (common.status & STATUS_NEEDS_RESET);
        if new & STATUS_FEATURES_OK != 0 && !self.features_fit(common.driver_features) {
            value &= !STATUS_FEATURES_OK;
        }
        common.status = value;
        let starts = new & STATUS_DRIVER_OK != 0;
        if starts {
            let event_idx = common.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
            for ring in &mut common.rings {
                ring.queue.set_event_idx(event_idx);
            }
            self.wake();
        }
    }

    fn features_fit(&self, accepted: u64) -> bool {
        accepted & !self.features() == 0 && accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }
}

impl Common {
    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_select).ok().filter(|index| *index < self.rings.len())
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let (mask, value) = match self.driver_features_select {
            0 => (0xffff_ffff, u64::from(value)),
            1 => (0xffff_ffff << 32, u64::from(value) << 32),
            _ => return,
        };
        self.driver_features = (self.driver_features & !mask) | value;
    }

    fn reset(&mut self) {
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.interrupt_status = 0;
        self.epoch += 1;
        for ring in &mut self.rings {
            ring.queue.reset();
            ring.unfinished = 0;
        }
    }
}

fn half(features: u64, select: u32) -> u32 {
    let bytes = features.to_le_bytes();
    let [b0, b1, b2, b3, b4, b5, b6, b7] = bytes;
    match select {
        0 => u32::from_le_bytes([b0, b1, b2, b3]),
        1 => u32::from_le_bytes([b4, b5, b6, b7]),
        _ => 0,
    }
}

const _: () = assert!(INTERRUPT_USED == 1);
