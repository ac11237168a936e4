//! A vCPU at the 64-bit entry of a Linux kernel.
//!
//! The boot protocol asks for long mode with the first gibibyte mapped one to
//! one, flat segments from a GDT, interrupts off and the zero page's address
//! in RSI.
//!
//! ```text
//! 0x0500  GDT: null, null, code (0x10), data (0x18), TSS (0x20)
//! 0x9000  PML4 ── 0xa000  PDPT ── 0xb000  PD, 512 entries of 2 MiB
//! ```

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestMap;
use crate::sys::kvm::{KvmError, call};

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000;

const PRESENT_WRITABLE: u64 = 0x3;
const HUGE: u64 = 0x80;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = (1 << 8) | (1 << 10);

/// Why a vCPU could not be put into long mode.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LongModeError {
    /// The tables lie outside guest memory.
    #[error("page tables: {0}")]
    Memory(#[from] GuestMemoryError),
    /// A register was refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Writes the tables and sets the registers so that the vCPU starts at
/// `entry` with `rsi` in RSI.
pub(crate) fn enter_long_mode(
    vcpu: &VcpuFd,
    memory: &GuestMap,
    entry: u64,
    rsi: u64,
) -> Result<(), LongModeError> {
    write_page_tables(memory)?;
    let code = segment(2, 0xb, true);
    let data = segment(3, 0x3, false);
    let tss = kvm_segment { limit: 0x67, s: 0, g: 0, db: 0, ..segment(4, 0xb, false) };
    for (index, segment) in [(2, code), (3, data), (4, tss)] {
        memory.write_obj(descriptor(&segment), GuestAddress(GDT + index * 8))?;
    }

    let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = tss;
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 5 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
    sregs.efer = EFER_LONG_MODE;
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;

    // Bit 1 of RFLAGS is always set.
    let regs = kvm_regs { rflags: 2, rip: entry, rsp: 0x8ff0, rbp: 0x8ff0, rsi, ..<_>::default() };
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    Ok(())
}

fn write_page_tables(memory: &GuestMap) -> Result<(), GuestMemoryError> {
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PD | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    for index in 0..512u64 {
        let entry = (index << 21) | HUGE | PRESENT_WRITABLE;
        memory.write_obj(entry, GuestAddress(PD + index * 8))?;
    }
    Ok(())
}

/// A flat segment with the given place in the GDT.
fn segment(index: u16, type_: u8, code64: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!code64),
        s: 1,
        l: u8::from(code64),
        g: 1,
        ..<_>::default()
    }
}

/// The segment as a GDT entry; its base is zero.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff) | access << 40 | ((limit >> 16) & 0xf) << 48 | flags << 52
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        assert_eq!(descriptor(&segment(2, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(3, 0x3, false)), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn the_first_gibibyte_maps_to_itself() {
        let memory = GuestMap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&memory).unwrap();
        let last: u64 = memory.read_obj(GuestAddress(PD + 511 * 8)).unwrap();
        assert_eq!(last, (511 << 21) | 0x83);
    }
}
