//! A root computed by a stranger who has read `docs/format.md` and nothing
//! else: recursive, over all bytes at once, without any code of the engine.

use coppice_engine::{ImageRef, PAGE_LEN, tree_root_of};

use crate::common::{noise, soft_pages};

fn hash(context: &str, bytes: &[u8]) -> [u8; 32] {
    blake3::derive_key(context, bytes)
}

/// The id of the node of `level` over `pages`, or nothing if all are zero.
fn node(level: u32, pages: &[[u8; PAGE_LEN]]) -> Option<[u8; 32]> {
    let span = 128_usize.pow(level);
    let mut bitmap = [0_u8; 16];
    let mut ids = Vec::new();
    for (child, slot) in pages.chunks(span).zip(0..) {
        let id = match level {
            0 if child[0] == [0; PAGE_LEN] => None,
            0 => Some(hash("coppice 2026-11 chunk v1", &child[0])),
            _ => node(level - 1, child),
        };
        if let Some(id) = id {
            bitmap[slot / 8] |= 1 << (slot % 8);
            ids.push(id);
        }
    }
    let count = u16::try_from(ids.len()).expect("at most 128");
    let level = u8::try_from(level).expect("at most 4");
    let mut bytes = vec![level, 0];
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&bitmap);
    bytes.extend_from_slice(&ids.concat());
    (count > 0).then(|| hash("coppice 2026-11 tree node v1", &bytes))
}

fn root(bytes: &[u8]) -> [u8; 32] {
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(PAGE_LEN), 0);
    let (pages, _) = padded.as_chunks::<PAGE_LEN>();
    let level = (0..4).find(|level| 128_usize.pow(level + 1) >= pages.len()).unwrap_or(4);
    let top = node(level, pages);
    let level = u8::try_from(level).expect("at most 4");
    let mut record = vec![0, level, u8::from(top.is_some()), 0, 0, 0, 0, 0];
    record.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    record.extend_from_slice(&top.unwrap_or_default());
    hash("coppice 2026-11 image root v1", &record)
}

#[test]
fn a_stranger_computes_the_same_root() {
    let mut holes = soft_pages(1, 20_000);
    holes[50 * PAGE_LEN..15_000 * PAGE_LEN].fill(0);
    let inputs = [
        Vec::new(),
        vec![1],
        vec![0; 10_000],
        noise(1, 128 * PAGE_LEN),
        noise(2, 128 * PAGE_LEN + 1),
        soft_pages(3, 128 * 128 + 1),
        holes,
    ];
    for bytes in inputs {
        let ImageRef { root: found, .. } = tree_root_of(&bytes[..]).expect("a root");
        assert_eq!(*found.as_bytes(), root(&bytes), "{} bytes", bytes.len());
    }
}
