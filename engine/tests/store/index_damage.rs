//! A flipped bit in a file of the index is told or harmless: never a wrong
//! byte, never a page less, and the index is always built again.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use coppice_engine::{ErrorKind, GcOptions, ImageRef, PAGE_LEN, Store, StoreError};

use crate::common::{named, noise, open, open_as, read_all, record_of, settings};
use crate::tried;

/// Blocks of each file that are hit; `COPPICE_LONG` takes all of them.
const BLOCKS: u64 = 10;
const BLOCK_LEN: u64 = 4096;

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().expect("a type").is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(&from, &to).expect("a copy");
        }
    }
}

/// A store with entries, marks, hints and a ledger on the disk.
fn made(dir: &Path) -> Vec<(ImageRef, Vec<u8>)> {
    let store = open(dir);
    let mut all = Vec::new();
    let mut bytes = vec![0; 2500 * PAGE_LEN];
    for (page, number) in bytes.chunks_mut(PAGE_LEN).zip(1_u64..) {
        page[..8].copy_from_slice(&number.to_le_bytes());
    }
    let mut base: Option<ImageRef> = None;
    for round in 0..4_u64 {
        let mut session = store.begin().expect("a session");
        let mut writer = session.image(bytes.len() as u64, base.as_ref()).expect("an image");
        if base.is_none() {
            writer.write(0, &bytes).expect("a write");
        }
        for page in (round..2500).step_by(397) {
            let new = noise(round * 10_000 + page, PAGE_LEN);
            if base.is_some() {
                writer.write(page, &new).expect("a write");
                let at = usize::try_from(page).expect("small") * PAGE_LEN;
                bytes[at..at + PAGE_LEN].copy_from_slice(&new);
            }
        }
        let image = writer.finish().expect("an image");
        session.commit(&record_of(image), named(&format!("s{round}"))).expect("a commit");
        all.push((image, bytes.clone()));
        base = Some(image);
    }
    store.remove("s2").expect("it is removed");
    all.remove(2);
    // A collection has the ledger written, and what it knows flushed.
    store.gc(GcOptions { dead_percent_min: 0, ..GcOptions::default() }).expect("a collection");
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
    all
}

fn files(index: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(index).expect("the index").map(|it| it.expect("a file").path());
    let mut files: Vec<PathBuf> = files.filter(|path| path.is_file()).collect();
    files.sort();
    files
}

/// Whether an error says what to do about it.
fn is_clear(error: &StoreError) -> bool {
    error.kind() == ErrorKind::Internal && error.to_string().contains("rebuild-index")
}

/// Uses everything; returns whether the damage was told.
fn is_told(dir: &Path, made: &[(ImageRef, Vec<u8>)]) -> bool {
    let store = match open_as(dir, &settings(coppice_engine::Settings::default().index)) {
        Ok(store) => store,
        Err(error) => {
            assert!(is_clear(&error), "{error:?}");
            return true;
        }
    };
    let mut told = false;
    let mut outcomes: Vec<Result<(), StoreError>> = Vec::new();
    for (image, bytes) in made {
        let mut out = vec![0xee; bytes.len()];
        let read = store.reader(image).and_then(|mut reader| reader.read_at(0, &mut out));
        assert!(read.is_err() || out == *bytes, "a wrong byte");
        outcomes.push(read.map(drop));
    }
    let options = GcOptions { dead_percent_min: 0, ..GcOptions::default() };
    outcomes.push(store.gc(options).map(drop));
    outcomes.push(store.check(&mut |_| {}).map(|report| told |= !report.is_clean()));
    for outcome in outcomes {
        if let Err(error) = outcome {
            let is_read = error.kind() == ErrorKind::Unavailable;
            assert!(is_clear(&error) || is_read, "{error:?}");
            told = true;
        }
    }
    drop(store);
    told
}

#[test]
fn a_flipped_bit_in_the_index_is_told_or_harmless() {
    let dir = tempfile::tempdir().expect("a folder");
    let whole = dir.path().join("whole");
    let made = made(&whole);
    let long = std::env::var_os("COPPICE_LONG").is_some();
    let (mut cases, mut told) = (0, 0);
    for file in files(&whole.join("index")) {
        let len = std::fs::metadata(&file).expect("a file").len();
        let blocks = len.div_ceil(BLOCK_LEN);
        let step = if long { 1 } else { blocks.div_ceil(BLOCKS).max(1) };
        for block in (0..blocks).step_by(usize::try_from(step).expect("small")) {
            let hit = dir.path().join("hit");
            copy(&whole, &hit);
            let at = (block * BLOCK_LEN + (block * 977 + 13) % BLOCK_LEN).min(len - 1);
            let name = file.file_name().expect("a name");
            let path = hit.join("index").join(name);
            let damaged = OpenOptions::new().read(true).write(true).open(path).expect("a file");
            let mut byte = [0];
            damaged.read_exact_at(&mut byte, at).expect("a byte");
            damaged.write_all_at(&[byte[0] ^ (1 << (block % 8))], at).expect("a write");
            let was_told = is_told(&hit, &made);
            told += u64::from(was_told);
            let built = Store::open_without_index(
                &hit,
                &settings(coppice_engine::Settings::default().index),
            );
            let store = built.expect("it is built again");
            for (image, bytes) in &made {
                assert!(read_all(&store, image) == *bytes, "{} at {at}", file.display());
            }
            assert!(store.check(&mut |_| {}).expect("a check").is_clean());
            drop(store);
            std::fs::remove_dir_all(&hit).expect("it goes");
            cases += 1;
        }
    }
    tried(cases, &format!("flipped bits in files of the index, {told} of them told"));
    assert!(told > 0);
}
