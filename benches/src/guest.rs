//! The guest: an image of memory in which a small loop runs in ring 3.
//!
//! ```text
//! page  0        not used, so that a stray zero is a fault
//! page  1        PML4
//! page  2        PDPT: one entry for each GiB
//! page  3        GDT (the segments are loaded by KVM_SET_SREGS, not from it)
//! page  4        the loop
//! page  5        task state segment
//! pages 8..      page directories, one for each GiB, 2 MiB pages, ring 3
//! pages 64..     data: all that the loop touches
//! ```
//!
//! The loop visits `count` pages of a sequence and then says so on a port. The
//! sequence `x' = (a x + c) mod 2^n` goes through all 2^n pages when `c` is odd
//! and `a - 1` is a multiple of 4, in order with `a = c = 1`.

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// The first page of data.
pub const DATA_PAGE: u64 = 64;

/// The port on which the guest speaks.
pub const PORT: u16 = 0x10;

/// Guest physical addresses of what KVM is told about.
pub const PML4: u64 = 0x1000;
/// Global descriptor table.
pub const GDT: u64 = 0x3000;
/// Entry point.
pub const CODE: u64 = 0x4000;
/// Task state segment.
pub const TSS: u64 = 0x5000;

const PDPT: u64 = 0x2000;
const DIRECTORIES: u64 = 0x8000;
const GIB: u64 = 1 << 30;

/// Present, writable, for ring 3, and accessed already, so that no walk of
/// the tables writes to them.
const TABLE: u64 = 0b10_0111;
/// The same, dirty already, and 2 MiB long.
const LARGE: u64 = 0b1110_0111;

/// A walk over pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Walk {
    /// The page before the first, counted from the base.
    pub seed: u64,
    /// Factor of the sequence.
    pub factor: u64,
    /// Step of the sequence.
    pub step: u64,
    /// Pages of the sequence less one: a power of two less one.
    pub mask: u64,
    /// Pages to visit.
    pub count: u64,
    /// Whether to write to them.
    pub write: bool,
    /// The page of memory at which the sequence starts.
    pub base: u64,
}

impl Walk {
    /// Pages `first..first + count`, in order.
    pub fn run(first: u64, count: u64, mask: u64, write: bool) -> Self {
        let seed = first.wrapping_sub(1) & mask;
        Self { seed, factor: 1, step: 1, mask, count, write, base: DATA_PAGE }
    }

    /// `count` pages all over `mask + 1`, none twice.
    pub fn scattered(seed: u64, count: u64, mask: u64, write: bool) -> Self {
        let (factor, step) = (0x5851_F42D, 0x1405_7B7F);
        Self { seed, factor, step, mask, count, write, base: DATA_PAGE }
    }

    /// The pages, counted from the start of memory.
    pub fn pages(&self) -> Vec<u64> {
        let mut at = self.seed;
        let mut visited = Vec::new();
        for _ in 0..self.count {
            at = at.wrapping_mul(self.factor).wrapping_add(self.step) & self.mask;
            visited.push(at + self.base);
        }
        visited
    }
}

/// The loop. Registers: r8 place in the sequence, r9 factor, r10 step, r11
/// mask, r12 address of the data, r13 whether to write, rcx how often.
///
/// A page that is written has the same word at its start and at its end, and
/// the words of pages that follow each other in the sequence differ by one.
const PROGRAM: [u8; 51] = [
    0xE6, 0x10, //             out 0x10, al     says that it runs
    //                    next:
    0x4D, 0x0F, 0xAF, 0xC1, // imul r8, r9
    0x4D, 0x01, 0xD0, //       add r8, r10
    0x4D, 0x21, 0xD8, //       and r8, r11
    0x4C, 0x89, 0xC0, //       mov rax, r8
    0x48, 0xC1, 0xE0, 0x0C, // shl rax, 12
    0x4C, 0x01, 0xE0, //       add rax, r12
    0x4D, 0x85, 0xED, //       test r13, r13
    0x75, 0x05, //             jnz write
    0x4C, 0x03, 0x30, //       add r14, [rax]
    0xEB, 0x0A, //             jmp done
    //                   write:
    0x48, 0x89, 0x08, //       mov [rax], rcx
    0x48, 0x89, 0x88, 0xF8, 0x0F, 0x00, 0x00, // mov [rax + 0xff8], rcx
    //                    done:
    0x48, 0xFF, 0xC9, //       dec rcx
    0x75, 0xD3, //             jnz next
    0xE6, 0x10, //             out 0x10, al     says that it is done
    0xEB, 0xCF, //             jmp next         with what the host set meanwhile
];

/// The whole memory. Data pages hold their own index, so none is zero.
pub fn image(len: usize) -> Vec<u8> {
    let mut memory = vec![0; len];
    put(&mut memory, PML4, PDPT | TABLE);
    for gib in 0..(len as u64).div_ceil(GIB) {
        let directory = DIRECTORIES + gib * PAGE as u64;
        put(&mut memory, PDPT + gib * 8, directory | TABLE);
        for entry in 0..512 {
            put(&mut memory, directory + entry * 8, (gib * GIB + (entry << 21)) | LARGE);
        }
    }
    // Null, ring-3 code (long mode), ring-3 data.
    put(&mut memory, GDT + 8, 0x00AF_FB00_0000_FFFF);
    put(&mut memory, GDT + 16, 0x00CF_F300_0000_FFFF);
    let code = usize_of(CODE);
    memory[code..code + PROGRAM.len()].copy_from_slice(&PROGRAM);
    for page in DATA_PAGE..(len / PAGE) as u64 {
        for word in 0..512 {
            put(&mut memory, page * PAGE as u64 + word * 8, scramble(page * 512 + word / 4));
        }
    }
    memory
}

/// Bytes that compress as memory does, to about a third.
pub(crate) fn scramble(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    mixed ^= mixed >> 29;
    mixed
}

fn put(memory: &mut [u8], address: u64, value: u64) {
    let at = usize_of(address);
    memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn usize_of(address: u64) -> usize {
    usize::try_from(address).expect("a guest address fits the address space of a 64-bit host")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_scattered_walk_visits_each_page_once() {
        let walk = Walk::scattered(7, 1024, 1023, false);
        let visited: HashSet<u64> = walk.pages().into_iter().collect();
        assert_eq!(visited, (DATA_PAGE..DATA_PAGE + 1024).collect());
    }

    #[test]
    fn a_run_is_in_order() {
        assert_eq!(Walk::run(3, 2, 15, false).pages(), [DATA_PAGE + 3, DATA_PAGE + 4]);
    }
}
