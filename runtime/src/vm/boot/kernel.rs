//! Kernel files: an ELF `vmlinux` or a bzImage, told apart by their magic.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Address, GuestAddress};

use super::HIGH_MEMORY;
use crate::memory::GuestMap;

/// Why a file is not loaded as a kernel.
#[derive(Debug, thiserror::Error)]
pub(in crate::vm) enum KernelError {
    /// It cannot be read.
    #[error("cannot read the kernel file: {0}")]
    Read(#[from] io::Error),
    /// Neither format.
    #[error("the file is no x86-64 Linux kernel: neither an ELF vmlinux nor a bzImage")]
    NoKernel,
    /// A bzImage for 32 bits only.
    #[error("the bzImage has no 64-bit entry point; only 64-bit kernels are started")]
    No64BitEntry,
    /// The loader refused it; the memory may be too small.
    #[error("cannot load the kernel (is the memory large enough?): {0}")]
    Load(#[from] linux_loader::loader::Error),
}

/// A loaded kernel.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Where the first vCPU starts.
    pub(super) entry: u64,
    /// What a bzImage says about itself.
    pub(super) setup_header: Option<setup_header>,
}

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const ELF_MACHINE_OFFSET: u64 = 18;
const ELF_MACHINE_X86_64: [u8; 2] = [62, 0];
const BZIMAGE_MAGIC: [u8; 4] = *b"HdrS";
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry of a bzImage lies this far behind its start.
const BZIMAGE_ENTRY: u64 = 0x200;

/// Loads either format.
pub(super) fn load(memory: &GuestMap, file: &mut File) -> Result<Loaded, KernelError> {
    let high = Some(GuestAddress(HIGH_MEMORY));
    if has(file, 0, &ELF_MAGIC)? && has(file, ELF_MACHINE_OFFSET, &ELF_MACHINE_X86_64)? {
        let loaded = Elf::load(memory, None, file, high)?;
        Ok(Loaded { entry: loaded.kernel_load.raw_value(), setup_header: None })
    } else if has(file, BZIMAGE_MAGIC_OFFSET, &BZIMAGE_MAGIC)? {
        let loaded = BzImage::load(memory, None, file, high)?;
        let header = loaded.setup_header.ok_or(KernelError::NoKernel)?;
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(KernelError::No64BitEntry);
        }
        let entry = loaded.kernel_load.raw_value() + BZIMAGE_ENTRY;
        Ok(Loaded { entry, setup_header: Some(header) })
    } else {
        Err(KernelError::NoKernel)
    }
}

fn has(file: &File, offset: u64, magic: &[u8]) -> io::Result<bool> {
    let mut bytes = vec![0; magic.len()];
    match file.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(bytes == magic),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn load_bytes(bytes: &[u8]) -> Result<Loaded, KernelError> {
        let mut file =
            File::from(rustix::fs::memfd_create("k", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all(bytes).unwrap();
        let memory = GuestMap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        load(&memory, &mut file)
    }

    #[test]
    fn other_files_are_no_kernels() {
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 4096]] {
            assert!(matches!(load_bytes(bytes), Err(KernelError::NoKernel)));
        }
    }

    #[test]
    fn a_cut_off_elf_is_refused() {
        let mut bytes = vec![0; 64];
        bytes[..4].copy_from_slice(&ELF_MAGIC);
        bytes[18] = 62;
        assert!(matches!(load_bytes(&bytes), Err(KernelError::Load(_))));
    }

    #[test]
    fn a_32_bit_bzimage_is_refused() {
        let mut bytes = vec![0; 8192];
        bytes[0x1f1] = 1;
        bytes[0x202..0x206].copy_from_slice(&BZIMAGE_MAGIC);
        bytes[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
        bytes[0x211] = 1;
        bytes[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        assert!(matches!(load_bytes(&bytes), Err(KernelError::No64BitEntry)));
    }
}
