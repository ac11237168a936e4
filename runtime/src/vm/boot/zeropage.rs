//! The zero page (`boot_params`): what a boot loader tells a Linux kernel.
//! Source: Documentation/arch/x86/boot.rst of the kernel.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, CMDLINE, CMDLINE_MAX, HIGH_MEMORY, MP_TABLE, ZERO_PAGE};
use crate::memory::{GuestMap, RamLayout};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// Writes the page.
pub(super) fn write(
    memory: &GuestMap,
    layout: RamLayout,
    header: Option<setup_header>,
    cmdline_len: usize,
) -> Result<(), BootError> {
    let page = parameters(layout, header, cmdline_len);
    memory.write_obj(page, GuestAddress(ZERO_PAGE))?;
    Ok(())
}

fn parameters(layout: RamLayout, header: Option<setup_header>, cmdline_len: usize) -> boot_params {
    let mut hdr = header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..<_>::default()
    });
    hdr.type_of_loader = LOADER_UNDEFINED;
    hdr.cmd_line_ptr = u32::try_from(CMDLINE).expect("the command line lies below 1 MiB");
    hdr.cmdline_size =
        u32::try_from(cmdline_len.min(CMDLINE_MAX)).expect("at most a few kibibytes");

    let mut parameters = boot_params { hdr, ..<_>::default() };
    for (at, entry) in parameters.e820_table.iter_mut().zip(e820(layout)) {
        *at = entry;
        parameters.e820_entries += 1;
    }
    parameters
}

fn e820(layout: RamLayout) -> Vec<boot_e820_entry> {
    let entry = |addr, size, r#type| boot_e820_entry { addr, size, r#type };
    let mut table =
        vec![entry(0, MP_TABLE, E820_RAM), entry(MP_TABLE, 0xa_0000 - MP_TABLE, E820_RESERVED)];
    for range in layout.ranges() {
        let hidden = HIGH_MEMORY.saturating_sub(range.gpa);
        table.push(entry(range.gpa + hidden, range.len - hidden, E820_RAM));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(layout: RamLayout) -> Vec<(u64, u64, u32)> {
        e820(layout).iter().map(|entry| (entry.addr, entry.size, entry.r#type)).collect()
    }

    #[test]
    fn all_ram_above_one_mebibyte_is_usable() {
        let small = ranges(RamLayout::new(64 << 20).unwrap());
        assert_eq!(small[2..], [(1 << 20, 63 << 20, E820_RAM)]);
        let large = ranges(RamLayout::new(4 << 30).unwrap());
        assert_eq!(
            large[2..],
            [(1 << 20, (3 << 30) - (1 << 20), E820_RAM), (4 << 30, 1 << 30, E820_RAM)]
        );
    }

    #[test]
    fn the_mp_table_is_reserved() {
        let table = ranges(RamLayout::new(64 << 20).unwrap());
        assert_eq!(table[1], (0x9_fc00, 0x400, E820_RESERVED));
    }

    #[test]
    fn a_bzimage_keeps_its_own_header() {
        let header = setup_header { version: 0x20f, init_size: 7, ..<_>::default() };
        let page = parameters(RamLayout::new(64 << 20).unwrap(), Some(header), 5);
        let (version, init_size, loader) =
            (page.hdr.version, page.hdr.init_size, page.hdr.type_of_loader);
        assert_eq!((version, init_size, loader), (0x20f, 7, 0xff));
    }
}
