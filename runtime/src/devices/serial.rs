//! The serial port: a 16550 whose output goes to the console log.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::console::ConsoleLog;

/// The interrupt of the first serial port on a PC.
pub(crate) const SERIAL_IRQ: u32 = 4;

/// Why there is no serial port.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SerialError {
    /// No interrupt.
    #[error("serial port: {0}")]
    Interrupt(#[from] io::Error),
    /// The saved registers are not those of this port.
    #[error("serial port: {0}")]
    State(#[from] vm_superio::serial::Error<io::Error>),
}

#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The counter is full: the interrupt is pending anyway.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

/// Its registers and what it has received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SerialSnapshot {
    registers: [u8; 9],
    received: Vec<u8>,
}

impl SerialSnapshot {
    fn of(state: &SerialState) -> Self {
        Self {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            received: state.in_buffer.clone(),
        }
    }

    fn state(&self) -> SerialState {
        let [low, high, enable, identification, line, status, modem, modem_status, scratch] =
            self.registers;
        SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status: status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: self.received.clone(),
        }
    }
}

type Port = vm_superio::Serial<Interrupt, NoEvents, ConsoleLog>;

/// The port at 0x3f8.
#[derive(Debug)]
pub(crate) struct Serial {
    port: Mutex<Port>,
    interrupt: EventFd,
}

impl Serial {
    /// A port after reset, or with saved registers.
    pub(crate) fn new(
        log: ConsoleLog,
        saved: Option<&SerialSnapshot>,
    ) -> Result<Self, SerialError> {
        let interrupt = EventFd::new(EFD_NONBLOCK)?;
        let state = saved.map_or_else(SerialState::default, SerialSnapshot::state);
        let trigger = Interrupt(interrupt.try_clone()?);
        let port = Port::from_state(&state, trigger, NoEvents, log)?;
        Ok(Self { port: Mutex::new(port), interrupt })
    }

    /// Signalled for each interrupt.
    pub(crate) fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// The guest reads a register.
    pub(crate) fn read(&self, register: u8) -> u8 {
        self.port().read(register)
    }

    /// The guest writes a register. A byte that the log cannot take (a full
    /// disk) is lost; the machine goes on.
    pub(crate) fn write(&self, register: u8, value: u8) {
        if let Err(error) = self.port().write(register, value) {
            tracing::debug!("serial port: {error}");
        }
    }

    /// Sends a pending interrupt again, as the virtio devices do.
    pub(crate) fn send_interrupt_again(&self) {
        let none_pending = 1;
        if self.port().state().interrupt_identification & none_pending == 0 {
            // A full counter means that it is pending.
            let _full = self.interrupt.write(1);
        }
    }

    /// Its state.
    pub(crate) fn save(&self) -> SerialSnapshot {
        SerialSnapshot::of(&self.port().state())
    }

    fn port(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Plays a guest that accesses the port as the bytes say: a register and whether
/// it is read, and a value.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hostile(input: &[u8]) {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let log = rustix::fs::memfd_create("console", flags).expect("a memfd");
    let serial = Serial::new(ConsoleLog::new(log.into()), None).expect("a port");
    for access in input.chunks_exact(2) {
        let register = access[0] & 7;
        if access[0] & 8 == 0 {
            serial.write(register, access[1]);
        } else {
            serial.read(register);
        }
    }
    let saved = serial.save();
    let log = rustix::fs::memfd_create("console", flags).expect("a memfd");
    let again = Serial::new(ConsoleLog::new(log.into()), Some(&saved)).expect("the same port");
    assert_eq!(again.save(), saved);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> ConsoleLog {
        ConsoleLog::new(tempfile::tempfile().unwrap())
    }

    #[test]
    fn registers_survive_a_round_trip() {
        let serial = Serial::new(log(), None).unwrap();
        for (register, value) in [(3, 0x80), (0, 7), (1, 9), (3, 3), (1, 5), (7, 0x42)] {
            serial.write(register, value);
        }
        let saved = serial.save();
        let bytes = postcard::to_stdvec(&saved).unwrap();
        let read: SerialSnapshot = postcard::from_bytes(&bytes).unwrap();
        let again = Serial::new(log(), Some(&read)).unwrap();
        assert_eq!(again.save(), saved);
        assert_eq!((again.read(7), again.read(1)), (0x42, 5));
    }

    #[test]
    fn a_pending_interrupt_is_raised_again() {
        let serial = Serial::new(log(), None).unwrap();
        serial.write(1, 2);
        assert_eq!(serial.interrupt().read().unwrap(), 1);
        let again = Serial::new(log(), Some(&serial.save())).unwrap();
        assert!(again.interrupt().read().is_ok());
        again.send_interrupt_again();
        assert_eq!(again.interrupt().read().unwrap(), 1);
    }
}
