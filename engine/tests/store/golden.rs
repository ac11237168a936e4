//! A store of format 1 as it was written once. It is never written again: a
//! change that cannot read it needs a new format version.

use std::path::{Path, PathBuf};

use coppice_engine::{
    CommitOptions, ImageRef, IndexKind, PAGE_LEN, Role, Settings, SnapshotRecord, Store,
    tree_root_of,
};

use crate::common::{name, named, noise, open, read_all, record_of, settings, soft_pages};

/// The roots of its memory images, in the order of the names below.
const ROOTS: [&str; 2] = [
    "0b57d46502b65bbe2aeb55a6f170d8e5f8031f835a5fd504d5befeaca77dceb0",
    "6bae798c15f9445a930e83bca755756e0cac8c3a6a2066ef64803968140c62fe",
];
const IDS: [&str; 2] = [
    "e4caf069898fa297e0c9bb110eb8dbb06b35f56c69aeedb76e6c6e98a7707783",
    "21c29802a4ebf9a8378315f62b1b3702e58a4cb49b88099a195823c3589562de",
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/format-1")
}

fn base_bytes() -> Vec<u8> {
    let mut bytes = soft_pages(1, 20);
    bytes.resize(200 * PAGE_LEN, 0);
    bytes.extend_from_slice(&noise(5, 1234));
    bytes
}

fn child_bytes() -> Vec<u8> {
    let mut bytes = base_bytes();
    bytes[3 * PAGE_LEN..4 * PAGE_LEN].copy_from_slice(&noise(3, PAGE_LEN));
    bytes[5 * PAGE_LEN..6 * PAGE_LEN].fill(0);
    bytes
}

fn write_golden(store: &Store) -> Vec<ImageRef> {
    let mut session = store.begin().expect("a session");
    let base_bytes = base_bytes();
    let mut writer = session.image(base_bytes.len() as u64, None).expect("an image");
    writer.write(0, &base_bytes).expect("a write");
    let base = writer.finish().expect("an image");
    let state = session.blob(b"machine state").expect("a blob");
    let record = SnapshotRecord {
        images: vec![(Role::Memory, base), (Role::State, state)],
        config: b"config".to_vec(),
        parent: None,
    };
    let labels = [("made".to_owned(), "by hand".to_owned())].into();
    let options = CommitOptions { name: Some(name("golden/base:1")), labels };
    let parent = session.commit(&record, options).expect("a commit").id;

    let mut session = store.begin().expect("a session");
    let child_bytes = child_bytes();
    let mut writer = session.image(base.len, Some(&base)).expect("an image");
    writer.write(3, &child_bytes[3 * PAGE_LEN..6 * PAGE_LEN]).expect("a write");
    let child = writer.finish().expect("an image");
    let record = SnapshotRecord {
        images: vec![(Role::Memory, child)],
        config: vec![],
        parent: Some(parent),
    };
    session.commit(&record, named("golden/child")).expect("a commit");
    store.tag("golden/child", name("kept")).expect("a tag");
    store.remove("golden/child").expect("a removal");
    vec![base, child]
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.join("packs")).expect("a folder");
    std::fs::create_dir_all(to.join("tmp")).expect("a folder");
    for file in ["FORMAT", "roots.log"] {
        std::fs::copy(from.join(file), to.join(file)).expect("a copy");
    }
    for pack in std::fs::read_dir(from.join("packs")).expect("the packs") {
        let pack = pack.expect("an entry");
        std::fs::copy(pack.path(), to.join("packs").join(pack.file_name())).expect("a copy");
    }
}

#[test]
#[ignore = "writes the golden store; run it once for a new format version"]
fn write_the_golden_store() {
    assert!(!folder().exists(), "the golden store is never written again");
    let store = Store::open(&folder(), &settings(IndexKind::Memory)).expect("a store");
    for image in write_golden(&store) {
        println!("root {}", image.root);
    }
    for entry in store.snapshots() {
        println!("id {}", entry.id);
    }
}

#[test]
fn the_golden_store_of_format_1_is_read() {
    let dir = tempfile::tempdir().expect("a folder");
    copy(&folder(), dir.path());
    let store = open(dir.path());
    let entries = store.snapshots();
    let ids: Vec<String> = entries.iter().map(|entry| entry.id.to_string()).collect();
    assert_eq!(ids, IDS);
    let memory = |at: usize| *entries[at].record.image(Role::Memory).expect("memory");
    for (at, bytes) in [base_bytes(), child_bytes()].into_iter().enumerate() {
        let image = memory(at);
        assert_eq!(image.root.to_string(), ROOTS[at]);
        assert_eq!(image, tree_root_of(&bytes[..]).expect("a root"));
        assert_eq!(read_all(&store, &image), bytes);
    }
    let state = entries[0].record.image(Role::State).expect("state");
    assert_eq!(read_all(&store, state), b"machine state");
    assert_eq!(entries[0].labels["made"], "by hand");
    assert!(entries[0].names.iter().eq([&name("golden/base:1")]));
    assert!(entries[1].names.iter().eq([&name("kept")]));
    assert_eq!(entries[1].record.parent, Some(entries[0].id));
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
}

#[test]
fn the_same_input_gives_the_same_packs() {
    let dirs = [tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder")];
    for dir in &dirs {
        write_golden(&open(dir.path()));
    }
    for file in ["roots.log", "packs/000000000001.pack", "packs/000000000002.pack"] {
        let [one, other] = &dirs;
        let one = std::fs::read(one.path().join(file)).expect("a file");
        let other = std::fs::read(other.path().join(file)).expect("a file");
        assert!(one == other, "{file}");
    }
}

/// A store of several packs, written by a pool of so many threads.
fn written_by(threads: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    pool.install(|| {
        let settings = Settings { pack_objects_max: 1500, ..settings(IndexKind::Memory) };
        let store = Store::open(dir.path(), &settings).expect("a store");
        // Pages that are new, repeated in the session, zero, hard and soft.
        let mut bytes = soft_pages(1, 3000);
        bytes.extend(noise(2, 2500 * PAGE_LEN));
        bytes.extend_from_within(100 * PAGE_LEN..900 * PAGE_LEN);
        bytes.resize(bytes.len() + 300 * PAGE_LEN, 0);
        bytes.extend(soft_pages(3, 1700));
        let mut session = store.begin().expect("a session");
        let mut writer = session.image(bytes.len() as u64, None).expect("an image");
        // The length of a write makes no difference either.
        let mut page = 0;
        for part in bytes.chunks((37 + 13 * threads) * PAGE_LEN) {
            writer.write(page, part).expect("a write");
            page += (part.len() / PAGE_LEN) as u64;
        }
        let image = writer.finish().expect("an image");
        session.commit(&record_of(image), named("it")).expect("a commit");
        assert_eq!(image, tree_root_of(&bytes[..]).expect("a root"));
    });
    dir
}

fn packs_of(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let packs = std::fs::read_dir(dir.join("packs")).expect("the packs");
    let mut packs: Vec<_> = packs
        .map(|pack| {
            let path = pack.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            (name, std::fs::read(path).expect("a pack"))
        })
        .collect();
    packs.sort();
    packs
}

#[test]
fn the_number_of_threads_makes_no_difference() {
    let one = packs_of(written_by(1).path());
    assert!(one.len() >= 4, "{} packs", one.len());
    for threads in [2, 8] {
        let other = packs_of(written_by(threads).path());
        assert!(one == other, "{threads} threads");
    }
}
