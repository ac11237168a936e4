//! Which objects lie in which pack, read from the packs' tables as
//! `docs/format.md` describes them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const FOOTER_LEN: usize = 96;
const KEY_LEN: usize = 20;
const PAGE_LEN: usize = 4096;

/// What packs and the index know an object by.
pub type Key = [u8; KEY_LEN];

/// The key of a page; none if it is all zeros. A partial page is padded.
pub fn of_page(bytes: &[u8]) -> Option<Key> {
    if bytes.iter().all(|byte| *byte == 0) {
        return None;
    }
    let mut page = [0; PAGE_LEN];
    page[..bytes.len()].copy_from_slice(bytes);
    blake3::derive_key("coppice 2026-11 chunk v1", &page).first_chunk().copied()
}

/// The keys of the pages of a file that are not all zeros.
pub fn of_file(path: &Path) -> Result<Vec<Key>> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok(bytes.chunks(PAGE_LEN).filter_map(of_page).collect())
}

/// The keys of all objects of each pack of a store.
pub fn of_store(store: &Path) -> Result<BTreeMap<PathBuf, HashSet<Key>>> {
    let mut packs = BTreeMap::new();
    for entry in std::fs::read_dir(store.join("packs"))? {
        let path = entry?.path();
        let keys = of_pack(&std::fs::read(&path)?).with_context(|| path.display().to_string())?;
        packs.insert(path, keys);
    }
    Ok(packs)
}

fn of_pack(bytes: &[u8]) -> Result<HashSet<Key>> {
    let end = bytes.len().checked_sub(FOOTER_LEN).context("too short for a footer")?;
    let (tables, footer) = bytes.split_at(end);
    ensure!(footer.starts_with(b"CPPKEND1"), "no footer");
    let number = |at: usize| -> Result<usize> {
        let bytes = footer.get(at..).and_then(<[u8]>::first_chunk).context("four bytes")?;
        Ok(usize::try_from(u32::from_le_bytes(*bytes))?)
    };
    let (pieces, objects) = (number(12)?, number(28)?);
    let end = tables.len().checked_sub(pieces * 4).context("too short for its pieces")?;
    let begin = end.checked_sub(objects * KEY_LEN).context("too short for its keys")?;
    let (keys, _) = tables[begin..end].as_chunks::<KEY_LEN>();
    Ok(keys.iter().copied().collect())
}
