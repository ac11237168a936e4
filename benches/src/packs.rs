//! Pack files by `docs/format.md` alone: counting what their tables say, and
//! making packs that are nothing but tables.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::effort::Random;

const FOOTER_LEN: u64 = 96;
const FRAME_HEADER_LEN: u64 = 80;
const HEADER_LEN: u64 = 16;
const KEY_LEN: usize = 20;
const KIND_PAGES: u8 = 1;
/// Objects of a frame of a made pack; they stand for pages of 4 KiB.
const FRAME_OBJECTS: u16 = 16;
/// What such a frame is said to take.
const FRAME_LEN: u32 = 80 + 16 * 1024;

/// What the tables of packs say.
#[derive(Debug, Clone, Copy, Default)]
pub struct Contents {
    /// Chunks in frames of pages.
    pub chunks: u64,
    /// Compressed bytes of frames of pages, their headers left out.
    pub page_bytes: u64,
    /// Lengths of the files.
    pub file_bytes: u64,
}

impl Contents {
    /// Of all packs of a store.
    pub fn of_store(store: &Path) -> Result<Self> {
        let mut all = Self::default();
        for entry in std::fs::read_dir(store.join("packs"))? {
            let file = File::open(entry?.path())?;
            let one = Self::of(&file)?;
            all.chunks += one.chunks;
            all.page_bytes += one.page_bytes;
            all.file_bytes += one.file_bytes;
        }
        Ok(all)
    }

    fn of(file: &File) -> Result<Self> {
        let file_bytes = file.metadata()?.len();
        let footer_at = file_bytes.checked_sub(FOOTER_LEN).context("a pack is too short")?;
        let mut footer = [0; 96];
        file.read_exact_at(&mut footer, footer_at)?;
        ensure!(&footer[..8] == b"CPPKEND1", "a pack has no footer");
        let number = |at: usize| u32::from_le_bytes(footer[at..at + 4].try_into().expect("four"));
        let (frames, objects) = (u64::from(number(24)), u64::from(number(28)));
        let tables_at = footer_at - frames * 8 - objects * KEY_LEN as u64;
        let mut rows = vec![0; usize::try_from(frames * 8)?];
        file.read_exact_at(&mut rows, tables_at)?;
        let mut found = Self { file_bytes, ..Self::default() };
        for row in rows.as_chunks::<8>().0.iter().filter(|row| row[6] == KIND_PAGES) {
            let len = u32::from_le_bytes([row[0], row[1], row[2], row[3]]);
            found.page_bytes += u64::from(len) - FRAME_HEADER_LEN;
            found.chunks += u64::from(u16::from_le_bytes([row[4], row[5]]));
        }
        Ok(found)
    }
}

/// Blocks of everything in a folder, in bytes.
pub fn disk_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += metadata.blocks() * 512;
        if metadata.is_dir() {
            bytes += disk_bytes(&entry.path())?;
        }
    }
    Ok(bytes)
}

fn checksum(context: &str, bytes: &[u8]) -> [u8; 16] {
    let hash = blake3::derive_key(context, bytes);
    *hash.first_chunk().expect("32 bytes have a first half")
}

/// Makes a pack whose frames are holes and whose keys are random: to an index
/// it is like any other.
pub fn make_hollow(packs: &Path, id: u64, objects: u32) -> Result<()> {
    let file = File::create_new(packs.join(format!("{id:012}.pack")))?;
    file.write_all_at(&[b"CPPACK01".as_slice(), &[1, 0, 0, 0, 0, 0, 0, 0]].concat(), 0)?;
    let mut tables = Vec::new();
    let (mut frames, mut left) = (0_u32, objects);
    while left > 0 {
        let count = u16::try_from(left).unwrap_or(u16::MAX).min(FRAME_OBJECTS);
        tables.extend_from_slice(&FRAME_LEN.to_le_bytes());
        tables.extend_from_slice(&count.to_le_bytes());
        tables.extend_from_slice(&[KIND_PAGES, 0]);
        left -= u32::from(count);
        frames += 1;
    }
    let keys_at = tables.len();
    tables.resize(keys_at + usize::try_from(objects)? * KEY_LEN, 0);
    Random::new(id).fill(&mut tables[keys_at..]);
    let mut footer = b"CPPKEND1".to_vec();
    footer.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    footer.extend_from_slice(&id.to_le_bytes());
    footer.extend_from_slice(&frames.to_le_bytes());
    footer.extend_from_slice(&objects.to_le_bytes());
    footer.extend_from_slice(&[0; 32]);
    footer.extend_from_slice(&checksum("coppice 2026-11 pack tables checksum v1", &tables));
    let sum = checksum("coppice 2026-11 pack footer checksum v1", &footer);
    footer.extend_from_slice(&sum);
    tables.extend_from_slice(&footer);
    file.write_all_at(&tables, HEADER_LEN + u64::from(frames) * u64::from(FRAME_LEN))?;
    Ok(())
}
