//! What the guest sees besides its CPUs and memory.

mod console;
mod gate;
mod serial;
pub(crate) mod virtio;

pub(crate) use console::ConsoleLog;
pub(crate) use gate::Gate;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use serial::hostile as hostile_serial;
pub(crate) use serial::{SERIAL_IRQ, Serial, SerialError, SerialSnapshot};
