//! The merkle root of an image, computed the slow and obvious way from
//! `docs/format.md` alone, so that the engine's roots can be held against it.

/// Children of a node.
const FANOUT: usize = 128;
/// Bytes of a chunk.
const CHUNK: usize = 4096;

type Id = [u8; 32];

/// The root of the image with these bytes, as hexadecimal digits.
pub fn root_of(bytes: &[u8]) -> String {
    let mut level: Vec<Option<Id>> = bytes.chunks(CHUNK).map(chunk_id).collect();
    let mut height = 0;
    loop {
        level = level.chunks(FANOUT).map(|children| node_id(height, children)).collect();
        if level.len() <= 1 {
            break;
        }
        height += 1;
    }
    let top = level.first().copied().flatten();
    let mut record = vec![0, height, u8::from(top.is_some()), 0, 0, 0, 0, 0];
    let len = u64::try_from(bytes.len()).expect("a slice's length fits in 64 bits");
    record.extend(len.to_le_bytes());
    record.extend(top.unwrap_or_default());
    let root = blake3::derive_key("coppice 2026-11 image root v1", &record);
    root.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn chunk_id(bytes: &[u8]) -> Option<Id> {
    if bytes.iter().all(|byte| *byte == 0) {
        return None;
    }
    let mut page = [0; CHUNK];
    page[..bytes.len()].copy_from_slice(bytes);
    Some(blake3::derive_key("coppice 2026-11 chunk v1", &page))
}

fn node_id(height: u8, children: &[Option<Id>]) -> Option<Id> {
    let present: Vec<&Id> = children.iter().flatten().collect();
    let count = u16::try_from(present.len()).expect("a node has at most 128 children");
    if count == 0 {
        return None;
    }
    let mut bits = [0u8; FANOUT / 8];
    for (slot, child) in children.iter().enumerate() {
        bits[slot / 8] |= u8::from(child.is_some()) << (slot % 8);
    }
    let mut node = vec![height, 0];
    node.extend(count.to_le_bytes());
    node.extend(bits);
    present.iter().for_each(|id| node.extend(*id));
    Some(blake3::derive_key("coppice 2026-11 tree node v1", &node))
}
