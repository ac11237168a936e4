//! The root of a byte stream computed by a stranger who has read
//! `docs/format.md` and nothing else: over all bytes at once, without any code
//! of the engine and without the crate that it cuts with.

use coppice_engine::{ImageRef, stream_root_of};

use crate::common::{noise, soft_pages};

fn hash(context: &str, bytes: &[u8]) -> [u8; 32] {
    blake3::derive_key(context, bytes)
}

/// MD5 of 64 equal bytes: RFC 1321 for a message of one block.
fn md5_of_block(value: u8) -> [u8; 16] {
    const SHIFTS: [[u32; 4]; 4] =
        [[7, 12, 17, 22], [5, 9, 14, 20], [4, 11, 16, 23], [6, 10, 15, 21]];
    let mut padding = [0; 64];
    padding[0] = 0x80;
    padding[56..].copy_from_slice(&512_u64.to_le_bytes());
    let mut state = [0x6745_2301_u32, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    for block in [[value; 64], padding] {
        let (words, _) = block.as_chunks::<4>();
        let [mut a, mut b, mut c, mut d] = state;
        for step in 0..64_usize {
            let (mixed, word) = match step / 16 {
                0 => ((b & c) | (!b & d), step),
                1 => ((d & b) | (!d & c), 5 * step + 1),
                2 => (b ^ c ^ d, 3 * step + 5),
                _ => (c ^ (b | !d), 7 * step),
            };
            let sine = (f64::from(u32::try_from(step + 1).expect("small")).sin().abs()
                * 4_294_967_296.0)
                .floor();
            let constant: u32 = format!("{sine}").parse().expect("below 2^32");
            let sum = a
                .wrapping_add(mixed)
                .wrapping_add(constant)
                .wrapping_add(u32::from_le_bytes(words[word % 16]));
            let turned = sum.rotate_left(SHIFTS[step / 16][step % 4]);
            (a, d, c, b) = (d, c, b, b.wrapping_add(turned));
        }
        let added = [a, b, c, d];
        state.iter_mut().zip(added).for_each(|(old, new)| *old = old.wrapping_add(new));
    }
    let mut digest = [0; 16];
    for (out, word) in digest.as_chunks_mut::<4>().0.iter_mut().zip(state) {
        *out = word.to_le_bytes();
    }
    digest
}

fn gear() -> Vec<u64> {
    let number = |value| {
        let digest = md5_of_block(value);
        u64::from_be_bytes(*digest.first_chunk().expect("16 bytes"))
    };
    (0..=255).map(number).collect()
}

fn chunk_len(gear: &[u64], rest: &[u8]) -> usize {
    let len = rest.len().min(65_536);
    let mut sum = 0_u64;
    for at in 4096..len - len % 2 {
        sum = (sum << 1).wrapping_add(gear[usize::from(rest[at])]);
        let mask = if at < 16_384 { 0x0000_d90f_0353_0000 } else { 0x0000_d903_0353_0000 };
        if sum & mask == 0 {
            return at;
        }
    }
    len
}

type Child = ([u8; 32], u64);

fn node(level: u8, children: &[Child]) -> Child {
    let mut bytes = vec![level, 1];
    bytes.extend_from_slice(&u16::try_from(children.len()).expect("256").to_le_bytes());
    for (id, len) in children {
        bytes.extend_from_slice(id);
        bytes.extend_from_slice(&len.to_le_bytes()[..if level == 0 { 4 } else { 8 }]);
    }
    let len = children.iter().map(|(_, len)| len).sum();
    (hash("coppice 2026-11 tree node v1", &bytes), len)
}

fn group(level: u8, children: &[Child]) -> Vec<Child> {
    let mut nodes = Vec::new();
    let mut open: Vec<Child> = Vec::new();
    for child in children {
        open.push(*child);
        if open.len() == 256 || (open.len() >= 4 && child.0[31] >= 252) {
            nodes.push(node(level, &open));
            open.clear();
        }
    }
    if !open.is_empty() {
        nodes.push(node(level, &open));
    }
    nodes
}

fn root(bytes: &[u8]) -> [u8; 32] {
    let gear = gear();
    let mut children: Vec<Child> = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (chunk, behind) = rest.split_at(chunk_len(&gear, rest));
        let is_zero = chunk.iter().all(|byte| *byte == 0);
        let id = if is_zero { [0; 32] } else { hash("coppice 2026-11 chunk v1", chunk) };
        children.push((id, chunk.len() as u64));
        rest = behind;
    }
    for level in 0.. {
        children = group(level, &children);
        if children.len() <= 1 {
            break;
        }
    }
    let top = children.first().map(|(id, _)| *id);
    let mut record = vec![1, 0, u8::from(top.is_some()), 0, 0, 0, 0, 0];
    record.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    record.extend_from_slice(&top.unwrap_or_default());
    hash("coppice 2026-11 image root v1", &record)
}

#[test]
fn a_stranger_computes_the_same_root() {
    assert_eq!(md5_of_block(b'a')[..4], [0x01, 0x48, 0x42, 0xd4]);
    let mut holes = noise(4, 9 << 20);
    holes[1 << 20..6 << 20].fill(0);
    let mut repeated = noise(5, 1 << 20);
    repeated.extend_from_within(..);
    let inputs = [
        Vec::new(),
        vec![1],
        vec![0; 100_000],
        vec![7; 3_000_001],
        noise(1, 4096),
        noise(2, 65_537),
        noise(3, 30 << 20),
        soft_pages(6, 3000),
        holes,
        repeated,
    ];
    for bytes in inputs {
        let ImageRef { root: found, .. } = stream_root_of(&bytes[..]).expect("a root");
        assert_eq!(*found.as_bytes(), root(&bytes), "{} bytes", bytes.len());
    }
}

/// Roots do not change with a version of the crate that cuts, or anything.
/// These were computed by `tests/reader/coppice_reader.py`.
#[test]
fn roots_stay_what_they_were() {
    let expected = [
        (0, "ae1c8a4399d7991c41f4ce43d05c15eac333fff69f8ceb66f9fbf9e9d4cd24db"),
        (5, "d7447a95d024f184bbd93eac60714b50027eb63f1601660c93fa3ed4954b61a3"),
        (3_000_000, "acebfd3cff10445b6c1c864fa64c05e085e41f85b0b7fef7431fd46ddd659118"),
    ];
    for (len, expected) in expected {
        let image = stream_root_of(&noise(9, len)[..]).expect("a root");
        assert_eq!(image.root.to_string(), expected, "{len} bytes");
    }
}
