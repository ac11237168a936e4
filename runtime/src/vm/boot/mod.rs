//! Loading a Linux kernel into empty memory.
//!
//! ```text
//! 0x0500   GDT                      (vcpu/longmode.rs)
//! 0x7000   zero page (boot_params)
//! 0x9000   page tables              (vcpu/longmode.rs)
//! 0x20000  command line
//! 0x9fc00  MP table
//! 1 MiB    kernel
//! ```

mod cmdline;
mod kernel;
mod mptable;
mod zeropage;

use std::fs::File;

pub(super) use cmdline::{CmdlineError, VirtioWindow, full_cmdline};
pub(super) use kernel::KernelError;
use vm_memory::GuestMemoryError;

use crate::memory::Ram;

/// Where the zero page lies; the kernel gets it in RSI.
pub(super) const ZERO_PAGE: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
/// Bytes for the command line with its final zero; the kernel takes 2,048.
const CMDLINE_MAX: usize = 2048;
const MP_TABLE: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;

/// Why a machine cannot boot.
#[derive(Debug, thiserror::Error)]
pub(super) enum BootError {
    /// The kernel file.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// Something lies outside the memory.
    #[error("boot structures: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The MP table has no room.
    #[error("{0} vCPUs: at most {max} fit the MP table", max = mptable::MAX_CPUS)]
    TooManyCpus(u32),
}

/// Loads the kernel with all that it looks for, and returns its entry point.
pub(super) fn load_linux(
    ram: &Ram,
    kernel: &mut File,
    cmdline: &str,
    vcpus: u8,
) -> Result<u64, BootError> {
    let memory = ram.guest();
    let loaded = kernel::load(memory, kernel)?;
    cmdline::write(memory, cmdline)?;
    mptable::write(memory, vcpus)?;
    zeropage::write(memory, ram.layout(), loaded.setup_header, cmdline.len())?;
    Ok(loaded.entry)
}
