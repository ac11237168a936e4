//! Guest memory: where it lies for the guest and in this process.

mod freed;
mod layout;
mod ram;
mod slot;

pub(crate) use freed::Freed;
pub(crate) use layout::{LayoutError, MMIO_BASE, RamLayout};
pub(crate) use ram::{GuestMap, Ram, RamError};
pub(crate) use slot::set_memslots;
