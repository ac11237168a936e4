//! A real file system that is full, index included.

use std::path::{Path, PathBuf};
use std::process::Command;

use coppice_engine::{ErrorKind, GcOptions, PAGE_LEN};

use crate::common::{commit_bytes, named, noise, open, read_all, record_of};

/// A small tmpfs, unmounted at the end.
struct Small {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Small {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().to_owned();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=24m", "coppice-test"]).arg(&path);
        let mounted = mount.status().is_ok_and(|status| status.success());
        mounted.then_some(Self { _dir: dir, path })
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(&self.path).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "the tmpfs is unmounted");
    }
}

#[test]
fn a_full_file_system_loses_nothing_and_heals_with_room() {
    let Some(small) = Small::mount() else {
        eprintln!("skipped: cannot mount a tmpfs");
        return;
    };
    let dir = small.path().join("store");
    let store = open(&dir);
    let kept = noise(1, 100 * PAGE_LEN);
    let image = commit_bytes(&store, &kept, "kept");
    let ballast = small.path().join("ballast");

    // Ever less room is left, so that each file in turn is the one that fails:
    // the index, the root log, the pack.
    let mut failures = 0;
    for free_kib in [2000, 1600, 1400, 1200, 1100, 1000, 900, 800, 700, 600, 300, 100, 20, 0] {
        fill(&ballast, free_kib);
        let bytes = many_small_chunks(free_kib);
        let outcome = try_commit(&store, &bytes, &format!("at-{free_kib}"));
        std::fs::remove_file(&ballast).expect("room again");
        if let Err(error) = outcome {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{free_kib} KiB: {error:?}");
            failures += 1;
            try_commit(&store, &bytes, &format!("again-{free_kib}")).expect("there is room");
        }
        assert_eq!(read_all(&store, &image), kept);
    }
    assert!(failures > 1, "it was full: {failures}");
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
    drop(store);
    let store = open(&dir);
    assert_eq!(read_all(&store, &image), kept);
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
}

/// Pages that compress so well that the index takes more than the pack.
fn many_small_chunks(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; 8000 * PAGE_LEN];
    for (page, number) in bytes.chunks_mut(PAGE_LEN).zip(0_u64..) {
        page[..8].copy_from_slice(&(number + (seed << 32)).to_le_bytes());
        page[8] = 1;
    }
    bytes
}

fn try_commit(
    store: &coppice_engine::Store,
    bytes: &[u8],
    as_name: &str,
) -> Result<(), coppice_engine::StoreError> {
    let mut session = store.begin()?;
    let image = session.blob(bytes)?;
    session.commit(&record_of(image), named(as_name)).map(drop)
}

/// Leaves about so much room.
fn fill(ballast: &Path, free_kib: u64) {
    use std::io::Write;
    let mut file = std::fs::File::create(ballast).expect("a file");
    let block = [1; 4096];
    let mut len = 0;
    while file.write_all(&block).is_ok() {
        len += 4096;
    }
    file.set_len(u64::saturating_sub(len, free_kib * 1024)).expect("a cut");
}

#[test]
fn an_index_that_cannot_be_flushed_forgets_no_pack() {
    let Some(small) = Small::mount() else {
        eprintln!("skipped: cannot mount a tmpfs");
        return;
    };
    let dir = small.path().join("store");
    let store = open(&dir);
    commit_bytes(&store, &noise(2, 100 * PAGE_LEN), "gone");
    let kept = noise(1, 100 * PAGE_LEN);
    let image = commit_bytes(&store, &kept, "kept");
    store.remove("gone").expect("it is removed");
    // Without the room that is set aside for this.
    std::fs::remove_file(dir.join("reserve")).expect("it was set aside");
    let ballast = small.path().join("ballast");
    fill(&ballast, 4);
    // The index must forget a pack durably before its file goes, and cannot.
    let error = store.gc(GcOptions::default()).expect_err("the disk is full");
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
    assert_eq!(read_all(&store, &image), kept);
    // The next write opens the index again, which fails too: what was not
    // flushed is then found in memory.
    try_commit(&store, &noise(4, 9 * PAGE_LEN), "too-much").expect_err("the disk is full");
    store.gc(GcOptions::default()).expect_err("the disk is full");
    assert_eq!(read_all(&store, &image), kept);
    assert!(store.page_map(&image).expect("a map").stored_pages() == 100);
    std::fs::remove_file(&ballast).expect("room again");
    let more = noise(3, 50 * PAGE_LEN);
    let next = commit_bytes(&store, &more, "next");
    assert_eq!(read_all(&store, &image), kept);
    assert_eq!(read_all(&store, &next), more);
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
    store.gc(GcOptions::default()).expect("a collection");
    assert_eq!(read_all(&store, &image), kept);
}

/// Not a block is left, and still room can be made: what was set aside is given
/// back, used, and set aside again.
#[test]
fn a_disk_without_a_free_block_is_cleared() {
    let Some(small) = Small::mount() else {
        eprintln!("skipped: cannot mount a tmpfs");
        return;
    };
    let dir = small.path().join("store");
    let reserve = dir.join("reserve");
    let store = open(&dir);
    let kept = noise(1, 100 * PAGE_LEN);
    let image = commit_bytes(&store, &kept, "kept");
    commit_bytes(&store, &noise(2, 1000 * PAGE_LEN), "gone");
    commit_bytes(&store, &noise(3, 500 * PAGE_LEN), "gone-too");
    assert!(reserve.exists());
    let ballast = small.path().join("ballast");
    fill(&ballast, 0);
    try_commit(&store, &noise(4, 9 * PAGE_LEN), "more").expect_err("the disk is full");
    assert!(reserve.exists(), "it is not for snapshots");
    store.remove("gone").expect("it is removed");
    assert_eq!(read_all(&store, &image), kept);
    let done = store.gc(GcOptions::default()).expect("a collection");
    assert!(done.dropped_packs == 1 && done.freed_bytes > 3 << 20, "{done:?}");
    assert_eq!(read_all(&store, &image), kept);
    try_commit(&store, &noise(5, 100 * PAGE_LEN), "more").expect("there is room");
    // Full again, and opened like that.
    fill(&ballast, 0);
    drop(store);
    let store = open(&dir);
    assert_eq!(read_all(&store, &image), kept);
    store.remove("gone-too").expect("it is removed");
    store.gc(GcOptions::default()).expect("a collection");
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
    std::fs::remove_file(&ballast).expect("room again");
    try_commit(&store, &noise(6, 100 * PAGE_LEN), "last").expect("there is room");
    assert!(reserve.exists(), "it is set aside again");
    assert_eq!(read_all(&store, &image), kept);
}
