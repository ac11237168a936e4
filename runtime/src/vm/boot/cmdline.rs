//! The kernel's command line: the user's, then what this machine adds.

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, CMDLINE, CMDLINE_MAX};
use crate::memory::GuestMap;

/// Why a command line is not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(in crate::vm) enum CmdlineError {
    /// Longer than the kernel reads.
    #[error("the kernel command line has {0} bytes with the devices, at most {max} are read", max = CMDLINE_MAX - 1)]
    TooLong(usize),
    /// A zero would end it early.
    #[error("the kernel command line contains a zero byte")]
    Zero,
}

/// Where a virtio-mmio device lies, for the kernel's `virtio_mmio.device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::vm) struct VirtioWindow {
    /// Guest-physical address of its page.
    pub(in crate::vm) address: u64,
    /// Its interrupt.
    pub(in crate::vm) irq: u32,
}

/// The user's parameters, the device declarations and the host's additions.
/// Everything behind `--` belongs to init and stays last.
pub(in crate::vm) fn full_cmdline(
    user: &str,
    devices: &[VirtioWindow],
    host: &str,
) -> Result<String, CmdlineError> {
    if user.contains('\0') {
        return Err(CmdlineError::Zero);
    }
    let (kernel, init) = match user.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (user, None),
    };
    let mut parts = vec![kernel.trim().to_owned(), host.to_owned()];
    parts.extend(
        devices.iter().map(|at| format!("virtio_mmio.device=4K@{:#x}:{}", at.address, at.irq)),
    );
    parts.extend(init.map(|init| format!("-- {init}")));
    parts.retain(|part| !part.is_empty());
    let line = parts.join(" ");
    if line.len() >= CMDLINE_MAX { Err(CmdlineError::TooLong(line.len())) } else { Ok(line) }
}

/// Writes it with its final zero.
pub(super) fn write(memory: &GuestMap, line: &str) -> Result<(), BootError> {
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, GuestAddress(CMDLINE))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: VirtioWindow = VirtioWindow { address: 0xd000_1000, irq: 6 };

    #[test]
    fn devices_come_before_the_arguments_of_init() {
        let line = full_cmdline("console=ttyS0 -- single", &[DEVICE], "a=b").unwrap();
        assert_eq!(line, "console=ttyS0 a=b virtio_mmio.device=4K@0xd0001000:6 -- single");
    }

    #[test]
    fn nothing_is_added_where_nothing_is_needed() {
        assert_eq!(full_cmdline("quiet", &[], "").unwrap(), "quiet");
    }

    #[test]
    fn what_the_kernel_would_cut_off_is_refused() {
        let long = "x".repeat(CMDLINE_MAX);
        assert_eq!(full_cmdline(&long, &[], ""), Err(CmdlineError::TooLong(CMDLINE_MAX)));
        assert_eq!(full_cmdline("a\0b", &[], ""), Err(CmdlineError::Zero));
    }
}
