//! Which device answers at which address.

use std::sync::Arc;

use crate::devices::Serial;
use crate::devices::virtio::Transport;
use crate::memory::MMIO_BASE;
use crate::vcpu::{Bus, End};

const SERIAL_PORTS: std::ops::Range<u16> = 0x3f8..0x400;
/// Keyboard controller: its command register can pulse the reset line, which
/// is how `reboot=k` restarts.
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_DATA: u16 = 0x60;
const PULSE_RESET: u8 = 0xfe;

/// Length of a virtio-mmio window.
pub(super) const WINDOW: u64 = 0x1000;

/// All devices of a machine.
#[derive(Debug)]
pub(super) struct Devices {
    pub(super) serial: Arc<Serial>,
    pub(super) virtio: Vec<Arc<Transport>>,
}

impl Devices {
    fn window(&self, address: u64) -> Option<(&Transport, u64)> {
        let from_base = address.checked_sub(MMIO_BASE)?;
        let index = usize::try_from(from_base / WINDOW).ok()?;
        Some((self.virtio.get(index)?.as_ref(), from_base % WINDOW))
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = SERIAL_PORTS.contains(&port).then(|| port - SERIAL_PORTS.start)?;
    u8::try_from(register).ok()
}

impl Bus for Devices {
    fn port_in(&self, port: u16, data: &mut [u8]) {
        match (serial_register(port), port) {
            // String input reads the same register again and again.
            (Some(register), _) => data.fill_with(|| self.serial.read(register)),
            // Idle, with nothing to say.
            (None, KEYBOARD_COMMAND | KEYBOARD_DATA) => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    fn port_out(&self, port: u16, data: &[u8]) -> Result<(), End> {
        if let Some(register) = serial_register(port) {
            data.iter().for_each(|byte| self.serial.write(register, *byte));
        } else if port == KEYBOARD_COMMAND && data == [PULSE_RESET] {
            return Err(End::clean("the guest restarted"));
        }
        Ok(())
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.window(address) {
            device.write(offset, data);
        }
    }
}
