//! Memory and disks share what they have in common: a page of memory that
//! holds a block of a disk is the same chunk, wherever either lies.

use coppice_engine::{CommitOptions, PAGE_LEN};

use crate::common::{commit_bytes, noise, open, read_all, record_of, soft_pages};

/// Blocks of the disk.
const BLOCKS: usize = 3000;
/// Pages of the memory that no disk has.
const OWN: usize = 50;

/// Where each block lies in the memory: shuffled, with gaps.
fn shuffled() -> Vec<usize> {
    let mut at: Vec<usize> = (0..BLOCKS).map(|block| block * 3).collect();
    let random = noise(7, BLOCKS * 8);
    for (last, bytes) in (1..BLOCKS).rev().zip(random.as_chunks::<8>().0) {
        let other = u64::from_le_bytes(*bytes) % (last as u64 + 1);
        at.swap(last, usize::try_from(other).expect("small"));
    }
    at
}

#[test]
fn memory_that_caches_a_disk_stores_only_what_is_its_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = open(folder.path());
    let disk = soft_pages(1, BLOCKS);
    commit_bytes(&store, &disk, "disk");

    let mut memory = vec![0; BLOCKS * 3 * PAGE_LEN];
    for (block, at) in disk.chunks(PAGE_LEN).zip(shuffled()) {
        memory[at * PAGE_LEN..][..PAGE_LEN].copy_from_slice(block);
    }
    let own = soft_pages(2, OWN);
    for (number, page) in own.chunks(PAGE_LEN).enumerate() {
        memory[(number * 150 + 1) * PAGE_LEN..][..PAGE_LEN].copy_from_slice(page);
    }
    let mut session = store.begin().expect("a session");
    let mut writer = session.image(memory.len() as u64, None).expect("an image");
    writer.write(0, &memory).expect("a write");
    let image = writer.finish().expect("an image");
    let done = session.commit(&record_of(image), CommitOptions::default()).expect("a commit");
    assert_eq!(done.new_bytes, (OWN * PAGE_LEN) as u64);
    assert!(read_all(&store, &image) == memory);
}
