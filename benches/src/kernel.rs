//! A kernel for whole machines: what a fork costs, without a guest system that
//! has a boot of its own.
//!
//! It enters ring 3, says `R` on the serial port and looks at a word in memory
//! until somebody has changed it: a snapshot of that instant, with the
//! word changed in the store, is a template whose forks begin with their work
//! at once. When it is done, an instruction that ring 3 may not use leads back
//! to ring 0, which prints what both walks took, and halts for good.
//!
//! ```text
//! 10_0000  program    10_1000  PML4, PDPT, page directory (2 MiB pages, ring 3)
//! 10_4000  GDT        10_4100  IDT: one gate, for general protection
//! 10_5000  what to do, pages to read, pages to write
//! 400_0000 data: 32,768 pages
//! ```

use crate::guest::scramble;

/// Memory that a machine with this kernel has.
pub const MEMORY_MIB: u64 = 256;
/// The page in which the word lies.
pub const ORDERS_PAGE: u64 = 0x105;
/// The first page that the walks may visit.
pub const DATA_PAGE: u64 = 0x4000;
/// How many.
pub const DATA_PAGES: u64 = 0x8000;
/// The seed of its walks, which are [`crate::guest::Walk::scattered`].
pub const SEED: u64 = 11;

/// What a template's forks do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    /// They wait for other orders.
    Wait,
    /// They halt at once.
    Idle,
    /// They read pages, write some of them, and halt.
    Work {
        /// Pages to read.
        reads: u32,
        /// Pages to write.
        writes: u32,
    },
}

impl Orders {
    /// The page that tells them.
    pub fn page(self) -> [u8; 4096] {
        let (word, reads, writes) = match self {
            Self::Wait => (0u32, 0, 0),
            Self::Idle => (2, 0, 0),
            Self::Work { reads, writes } => (1, reads, writes),
        };
        let mut page = [0; 4096];
        for (place, number) in page.chunks_exact_mut(4).zip([word, reads, writes]) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        page
    }
}

/// A page of data, which no other page equals.
pub fn data_page(page: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    for (word, place) in (0..).zip(bytes.chunks_exact_mut(8)) {
        place.copy_from_slice(&scramble(page * 512 + word / 4).to_le_bytes());
    }
    bytes
}

/// What a machine that has worked says: ticks of its clock for its reads and
/// for its writes, if it is done.
pub fn said(console: &str) -> Option<(u32, u32)> {
    let mut numbers = console.trim_start_matches('R').lines().map(number);
    let (reads, writes) = (numbers.next()??, numbers.next()??);
    Some((reads, writes))
}

/// Eight digits, of which `A` is zero.
fn number(line: &str) -> Option<u32> {
    if line.len() != 8 {
        return None;
    }
    line.bytes().try_fold(0u32, |number, digit| {
        let digit = digit.checked_sub(b'A').filter(|digit| *digit < 16)?;
        Some(number << 4 | u32::from(digit))
    })
}

const LOAD: u64 = 0x10_0000;
const PML4: u64 = 0x10_1000;
const PDPT: u64 = 0x10_2000;
const DIRECTORY: u64 = 0x10_3000;
const GDT: u64 = 0x10_4000;
const IDT: u64 = 0x10_4100;
const LEN: u64 = 0x6000;
/// Where the program goes on after a general protection fault.
const HANDLER: u64 = 0x10_00C8;

/// Present, writable, for ring 3.
const TABLE: u64 = 0b111;
/// The same, touched already, and 2 MiB long.
const LARGE: u64 = 0b1110_0111;

/// Registers of a walk: r8 place in the sequence, rdi address, rcx pages left, rbp
/// whether it writes. What the walks took is in r14 and r15.
const PROGRAM: [u8; 269] = [
    0x0F, 0x01, 0x14, 0x25, 0xF9, 0x00, 0x10, 0x00, // lgdt 0x1000f9
    0x0F, 0x01, 0x1C, 0x25, 0x03, 0x01, 0x10, 0x00, // lidt 0x100103
    0xB8, 0x00, 0x10, 0x10, 0x00, // mov eax,0x101000
    0x0F, 0x22, 0xD8, // mov cr3,rax
    0x48, 0xC7, 0x04, 0x25, 0x04, 0x00, 0x00, 0x00, 0xF0, 0x8F, 0x00, 0x00, // mov 0x4,0x8ff0
    0x66, 0xBA, 0xF8, 0x03, // mov dx,0x3f8
    0xB0, 0x52, // mov al,0x52
    0xEE, // out dx,al
    0x6A, 0x2B, // push 0x2b
    0x68, 0x00, 0x80, 0x00, 0x00, // push 0x8000
    0x6A, 0x02, // push 0x2
    0x6A, 0x33, // push 0x33
    0x68, 0x3D, 0x00, 0x10, 0x00, // push 0x10003d
    0x48, 0xCF, // iretq
    //                    user:
    0xF3, 0x90, // pause
    0x8A, 0x04, 0x25, 0x00, 0x50, 0x10, 0x00, // mov al,0x105000
    0x84, 0xC0, // test al,al
    0x74, 0xF3, // je user
    0x45, 0x31, 0xF6, // xor r14d,r14d
    0x45, 0x31, 0xFF, // xor r15d,r15d
    0xFE, 0xC8, // dec al
    0x75, 0x32, // jne done
    0x8B, 0x0C, 0x25, 0x04, 0x50, 0x10, 0x00, // mov ecx,0x105004
    0x31, 0xED, // xor ebp,ebp
    0x0F, 0x31, // rdtsc
    0x89, 0xC3, // mov ebx,eax
    0xE8, 0x21, 0x00, 0x00, 0x00, // call walk
    0x0F, 0x31, // rdtsc
    0x29, 0xD8, // sub eax,ebx
    0x41, 0x89, 0xC6, // mov r14d,eax
    0x8B, 0x0C, 0x25, 0x08, 0x50, 0x10, 0x00, // mov ecx,0x105008
    0xFF, 0xC5, // inc ebp
    0x0F, 0x31, // rdtsc
    0x89, 0xC3, // mov ebx,eax
    0xE8, 0x08, 0x00, 0x00, 0x00, // call walk
    0x0F, 0x31, // rdtsc
    0x29, 0xD8, // sub eax,ebx
    0x41, 0x89, 0xC7, // mov r15d,eax
    //                    done:
    0xF4, // hlt
    //                    walk:
    0x41, 0xB8, 0x0B, 0x00, 0x00, 0x00, // mov r8d,0xb
    //                    next:
    0x45, 0x69, 0xC0, 0x2D, 0xF4, 0x51, 0x58, // imul r8d,r8d,0x5851f42d
    0x41, 0x81, 0xC0, 0x7F, 0x7B, 0x05, 0x14, // add r8d,0x14057b7f
    0x41, 0x81, 0xE0, 0xFF, 0x7F, 0x00, 0x00, // and r8d,0x7fff
    0x44, 0x89, 0xC7, // mov edi,r8d
    0x48, 0xC1, 0xE7, 0x0C, // shl rdi,0xc
    0x48, 0x81, 0xC7, 0x00, 0x00, 0x00, 0x04, // add rdi,0x4000000
    0x85, 0xED, // test ebp,ebp
    0x75, 0x05, // jne write
    0x4C, 0x03, 0x0F, // add r9,[rdi]
    0xEB, 0x0A, // jmp visited
    //                    write:
    0x48, 0x89, 0x0F, // mov [rdi],rcx
    0x48, 0x89, 0x8F, 0xF8, 0x0F, 0x00, 0x00, // mov [rdi+0xff8],rcx
    //                    visited:
    0xFF, 0xC9, // dec ecx
    0x75, 0xC6, // jne next
    0xC3, // ret
    //                    handler:
    0x66, 0xBA, 0xF8, 0x03, // mov dx,0x3f8
    0x44, 0x89, 0xF3, // mov ebx,r14d
    0xE8, 0x0C, 0x00, 0x00, 0x00, // call print
    0x44, 0x89, 0xFB, // mov ebx,r15d
    0xE8, 0x04, 0x00, 0x00, 0x00, // call print
    //                    halt:
    0xFA, // cli
    0xF4, // hlt
    0xEB, 0xFC, // jmp halt
    //                    print:
    0xB9, 0x08, 0x00, 0x00, 0x00, // mov ecx,0x8
    //                    digit:
    0xC1, 0xC3, 0x04, // rol ebx,0x4
    0x89, 0xD8, // mov eax,ebx
    0x83, 0xE0, 0x0F, // and eax,0xf
    0x83, 0xC0, 0x41, // add eax,0x41
    0xEE, // out dx,al
    0xFF, 0xC9, // dec ecx
    0x75, 0xF0, // jne digit
    0xB0, 0x0A, // mov al,0xa
    0xEE, // out dx,al
    0xC3, // ret
    //                    descriptor tables: limit and address
    0x37, 0x00, 0x00, 0x40, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, // gdtr
    0xDF, 0x00, 0x00, 0x41, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, // idtr
];

/// The kernel as an ELF file.
pub fn elf(orders: Orders) -> Vec<u8> {
    let mut memory = vec![0; usize_of(LEN)];
    memory[..PROGRAM.len()].copy_from_slice(&PROGRAM);
    let mut put = |address: u64, value: u64| {
        let at = usize_of(address - LOAD);
        memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    put(PML4, PDPT | TABLE);
    put(PDPT, DIRECTORY | TABLE);
    for entry in 0..512 {
        put(DIRECTORY + entry * 8, entry << 21 | LARGE);
    }
    // Code and data of ring 0, data and code of ring 3.
    put(GDT + 0x10, 0x00AF_9B00_0000_FFFF);
    put(GDT + 0x18, 0x00CF_9300_0000_FFFF);
    put(GDT + 0x28, 0x00CF_F300_0000_FFFF);
    put(GDT + 0x30, 0x00AF_FB00_0000_FFFF);
    // An interrupt gate to ring 0.
    let gate = HANDLER & 0xFFFF | 0x10 << 16 | 0x8E00 << 32 | (HANDLER >> 16) << 48;
    put(IDT + 13 * 16, gate);
    memory[usize_of(LEN) - 4096..].copy_from_slice(&orders.page());
    let mut file = header();
    file.resize(usize_of(FILE_OFFSET), 0);
    file.extend(memory);
    file
}

/// Where the segment lies in the file.
const FILE_OFFSET: u64 = 0x1000;

/// Header of a 64-bit x86 program with one segment.
fn header() -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let halves = |bytes: &mut Vec<u8>, numbers: &[u16]| {
        numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    };
    let words = |bytes: &mut Vec<u8>, numbers: &[u32]| {
        numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    };
    let longs = |bytes: &mut Vec<u8>, numbers: &[u64]| {
        numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    };
    // Executable for x86-64, version 1; entry, program headers, no sections.
    halves(&mut bytes, &[2, 62]);
    words(&mut bytes, &[1]);
    longs(&mut bytes, &[LOAD, 64, 0]);
    words(&mut bytes, &[0]);
    halves(&mut bytes, &[64, 56, 1, 0, 0, 0]);
    // One segment to load, which may be read, written and executed.
    words(&mut bytes, &[1, 7]);
    longs(&mut bytes, &[FILE_OFFSET, LOAD, LOAD, LEN, LEN, 4096]);
    bytes
}

fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("a guest address fits the address space of a 64-bit host")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_machine_says_is_read_back() {
        assert_eq!(said("RAAAAAAAP\nAAAAAABA\n"), Some((15, 16)));
        assert_eq!(said("RAAAAAAAP\nAAAA"), None);
        assert_eq!(said("R"), None);
    }

    #[test]
    fn the_program_ends_before_its_tables() {
        let file = elf(Orders::Wait);
        assert_eq!(file.len() as u64, FILE_OFFSET + LEN);
        assert!((PROGRAM.len() as u64) < PML4 - LOAD);
        // `mov dx, 0x3f8` is the first instruction of the handler.
        let handler = usize_of(HANDLER - LOAD);
        assert_eq!(PROGRAM[handler..handler + 4], [0x66, 0xBA, 0xF8, 0x03]);
    }
}
