//! The Intel MultiProcessor table: processors and interrupt wiring for a
//! kernel without ACPI. Source: MultiProcessor Specification 1.4.
//!
//! ```text
//! floating pointer (16) │ header (44) │ processors (20 each) │ bus (8) │
//! I/O APIC (8) │ interrupts (8 each, 24) │ local interrupts (8 each, 2)
//! ```
//!
//! The kernel looks for the floating pointer in the last kibibyte below
//! 640 KiB first; finding it there saves it a scan.

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, MP_TABLE};
use crate::memory::GuestMap;

/// As many processors as fit one kibibyte.
pub(super) const MAX_CPUS: u8 = 32;

const IO_APIC_ADDRESS: u32 = 0xfec0_0000;
const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
const IO_APIC_PINS: u8 = 24;
const APIC_VERSION: u8 = 0x14;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const KIND_INT: u8 = 0;
const KIND_NMI: u8 = 1;
const KIND_EXTINT: u8 = 3;

const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// On-chip FPU and APIC.
const CPU_FEATURES: u32 = 0x201;

/// Writes the table for `vcpus` processors.
pub(super) fn write(memory: &GuestMap, vcpus: u8) -> Result<(), BootError> {
    if vcpus > MAX_CPUS {
        return Err(BootError::TooManyCpus(u32::from(vcpus)));
    }
    memory.write_slice(&table(vcpus), GuestAddress(MP_TABLE))?;
    Ok(())
}

fn table(vcpus: u8) -> Vec<u8> {
    let mut bytes = floating_pointer();
    bytes.extend(configuration(vcpus));
    bytes
}

fn floating_pointer() -> Vec<u8> {
    let configuration = u32::try_from(MP_TABLE + 16).expect("the table lies below 1 MiB");
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(configuration.to_le_bytes());
    // Length in 16-byte units, revision 1.4, checksum, no default configuration.
    bytes.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

fn configuration(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries: Vec<Vec<u8>> = (0..vcpus).map(processor).collect();
    entries.push([&[BUS, 0], &b"ISA   "[..]].concat());
    entries.push(
        [&[IO_APIC, io_apic_id, APIC_VERSION, 1], &IO_APIC_ADDRESS.to_le_bytes()[..]].concat(),
    );
    entries.extend((0..IO_APIC_PINS).map(|pin| {
        // Polarity and trigger as the bus has them: edge, active high.
        vec![INTERRUPT, KIND_INT, 0, 0, 0, pin, io_apic_id, pin]
    }));
    entries.push(vec![LOCAL_INTERRUPT, KIND_EXTINT, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![LOCAL_INTERRUPT, KIND_NMI, 0, 0, 0, 0, 0xff, 1]);

    let count = u16::try_from(entries.len()).expect("a few dozen entries");
    let body = entries.concat();
    let len = u16::try_from(44 + body.len()).expect("less than a kibibyte");
    let mut bytes = b"PCMP".to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend([4, 0]);
    bytes.extend(b"COPPICE MACHINE     ");
    bytes.extend([0; 6]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(LOCAL_APIC_ADDRESS.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    set_checksum(&mut bytes, 7);
    bytes
}

fn processor(id: u8) -> Vec<u8> {
    let flags = CPU_ENABLED | if id == 0 { CPU_BOOT } else { 0 };
    let mut bytes = vec![PROCESSOR, id, APIC_VERSION, flags];
    bytes.extend(0x600u32.to_le_bytes());
    bytes.extend(CPU_FEATURES.to_le_bytes());
    bytes.extend([0; 8]);
    bytes
}

/// Makes all bytes sum to zero.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = sum.wrapping_neg();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_parts_sum_to_zero_and_say_their_length() {
        for vcpus in [1, 2, MAX_CPUS] {
            let bytes = table(vcpus);
            let (pointer, configuration) = bytes.split_at(16);
            assert_eq!((sum(pointer), sum(configuration)), (0, 0));
            let len = u16::from_le_bytes([configuration[4], configuration[5]]);
            assert_eq!(usize::from(len), configuration.len());
            assert_eq!(configuration.len(), 44 + 20 * usize::from(vcpus) + 8 * 28);
        }
    }

    #[test]
    fn the_largest_table_fits_its_kibibyte() {
        assert!(table(MAX_CPUS).len() <= 1024);
    }

    #[test]
    fn every_pin_has_an_interrupt() {
        let bytes = table(1);
        let first = 16 + 44 + 20 + 8 + 8;
        for pin in 0..24u8 {
            let entry = &bytes[first + 8 * usize::from(pin)..][..8];
            assert_eq!(entry, [INTERRUPT, 0, 0, 0, 0, pin, 1, pin]);
        }
    }

    #[test]
    fn more_processors_than_fit_are_refused() {
        let memory = GuestMap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        assert!(matches!(write(&memory, MAX_CPUS + 1), Err(BootError::TooManyCpus(33))));
    }
}
