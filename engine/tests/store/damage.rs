//! Damage is found, named, contained and healed.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use coppice_engine::{
    CheckReport, CheckScope, ErrorKind, ImageRef, PAGE_LEN, PageReader, ReadCause, Store,
};

use crate::common::{commit_bytes, noise, open, read_all, soft_pages};

fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("the file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a read");
    file.write_all_at(&[byte[0] ^ 1], offset).expect("a write");
}

fn packs(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.join("packs")).expect("the packs");
    let mut packs: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    packs.sort();
    packs
}

fn check(store: &Store) -> CheckReport {
    store.check(&mut |_| {}).expect("a check")
}

fn two_snapshots(dir: &Path) -> (Vec<u8>, ImageRef) {
    let store = open(dir);
    let bytes = soft_pages(1, 64);
    let image = commit_bytes(&store, &bytes, "hit");
    commit_bytes(&store, &noise(2, 10 * PAGE_LEN), "spared");
    assert!(check(&store).is_clean());
    (bytes, image)
}

#[test]
fn a_flip_in_any_block_of_a_pack_is_found() {
    let dir = tempfile::tempdir().expect("a folder");
    two_snapshots(dir.path());
    let pack = packs(dir.path()).remove(0);
    let len = std::fs::metadata(&pack).expect("the pack").len();
    for block in 0..len.div_ceil(4096) {
        let offset = (block * 4096 + (block * 977) % 4096).min(len - 1);
        flip(&pack, offset);
        let report = check(&open(dir.path()));
        assert!(!report.is_clean(), "a flip at {offset} of {len}");
        assert!(report.damages.iter().all(|damage| damage.pack.is_some()));
        assert!(report.damages.iter().all(|damage| !damage.snapshots.contains("spared")));
        flip(&pack, offset);
    }
    assert!(check(&open(dir.path())).is_clean());
}

/// Every block of every file of the truth, once, with images read besides: no
/// wrong byte is ever given out.
#[test]
fn a_flip_anywhere_is_found_and_no_wrong_byte_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    let store = open(dir.path());
    let mut session = store.begin().expect("a session");
    let mut writer = session.image(image.len, Some(&image)).expect("an image");
    writer.write(5, &noise(7, 3 * PAGE_LEN)).expect("a write");
    let patched = writer.finish().expect("an image");
    session
        .commit(&crate::common::record_of(patched), crate::common::named("patched"))
        .expect("a commit");
    let patched_bytes = read_all(&store, &patched);
    drop(store);
    let settings = crate::common::settings(coppice_engine::IndexKind::Memory);
    let mut cases = 0;
    for pack in packs(dir.path()) {
        let len = std::fs::metadata(&pack).expect("the pack").len();
        for at in (0..len.div_ceil(4096)).flat_map(|block| [block * 4096 + 11, block * 4096 + 3333])
        {
            let at = at.min(len - 1);
            flip(&pack, at);
            let store = crate::common::open_as(dir.path(), &settings).expect("it opens");
            assert!(!check(&store).is_clean(), "{} at {at}", pack.display());
            for (image, bytes) in [(&image, &bytes), (&patched, &patched_bytes)] {
                let mut out = vec![0; bytes.len()];
                let read = store.reader(image).and_then(|mut reader| reader.read_at(0, &mut out));
                assert!(read.is_err() || out == *bytes, "{} at {at}", pack.display());
            }
            drop(store);
            flip(&pack, at);
            cases += 1;
        }
    }
    crate::tried(cases, "flipped bits");
    assert!(cases > 80, "{cases}");
}

#[test]
fn a_check_of_the_structure_reads_no_pages_and_a_sample_some() {
    let dir = tempfile::tempdir().expect("a folder");
    two_snapshots(dir.path());
    flip(&packs(dir.path())[0], 16 + 80 + 100);
    let store = open(dir.path());
    let some = |scope| store.check_some(scope, &mut |_| {}).expect("a check");
    let structure = some(CheckScope::Structure);
    assert!(structure.is_clean() && structure.chunks == 0 && structure.skipped_frames > 0);
    assert!(!some(CheckScope::Sample { percent: 100, seed: 1 }).is_clean());
    assert_eq!(some(CheckScope::Sample { percent: 0, seed: 1 }).frames, structure.frames);
    let half = |seed| some(CheckScope::Sample { percent: 50, seed }).skipped_frames;
    assert_eq!(half(3), half(3));
    assert!(!some(CheckScope::Full).is_clean());
    // Tree nodes are no pages.
    let pack = packs(dir.path()).remove(1);
    let len = std::fs::metadata(&pack).expect("the pack").len();
    flip(&pack, len - 96 - 40 - 20 * 14 - 300);
    assert!(!some(CheckScope::Structure).is_clean());
}

#[test]
fn a_repair_keeps_what_is_sound() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    flip(&packs(dir.path())[0], 16 + 80 + 100);
    let store = open(dir.path());
    let (repaired, left) = store.repair(&mut |_| {}).expect("a repair");
    assert_eq!((repaired.quarantined.len(), repaired.lost_frames), (1, 1));
    assert!(left.damages.iter().all(|damage| damage.snapshots.iter().eq(["hit"])), "{left:?}");
    assert!(dir.path().join("quarantine/000000000001.pack").exists());
    let mut reader = store.reader(&image).expect("a reader");
    let mut page = [0; PAGE_LEN];
    assert_eq!(reader.read_at(0, &mut page).expect_err("lost").kind(), ErrorKind::Corrupt);
    drop((reader, store));
    let store = open(dir.path());
    commit_bytes(&store, &bytes, "again");
    assert!(read_all(&store, &image) == bytes);
    assert!(check(&store).is_clean());
    let (again, left) = store.repair(&mut |_| {}).expect("nothing to repair");
    assert!(left.is_clean() && again.quarantined.is_empty());
}

#[test]
fn a_bad_chunk_is_named_and_reaches_nobody() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    let pack = packs(dir.path()).remove(0);
    flip(&pack, 16 + 80 + 100);
    let store = open(dir.path());

    let map = store.page_map(&image).expect("a map");
    let reader = PageReader::new();
    for pack in map.packs() {
        reader.add_pack(*pack, store.pack_file(*pack).expect("a pack"));
    }
    let error = reader.fetch(&map, 0, &mut |_, _| panic!("no byte of it")).expect_err("damage");
    assert!(matches!(error.cause, ReadCause::Format(_)));
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains(&error.chunk.to_string()));
    reader.fetch(&map, 20, &mut |_, _| {}).expect("other frames are well");

    let mut page = [0; PAGE_LEN];
    let mut image_reader = store.reader(&image).expect("a reader");
    assert_eq!(image_reader.read_at(0, &mut page).expect_err("damage").kind(), ErrorKind::Corrupt);
    image_reader.read_at(20 * PAGE_LEN as u64, &mut page).expect("another page");
    assert_eq!(page[..], bytes[20 * PAGE_LEN..21 * PAGE_LEN]);

    let report = check(&store);
    let [damage] = &report.damages[..] else { panic!("one damage: {report:?}") };
    assert_eq!(damage.offset, Some(16));
    assert!(damage.objects.contains(&error.chunk.to_string()));
    assert_eq!(damage.objects.len(), 16);
    assert_eq!(damage.snapshots.iter().collect::<Vec<_>>(), ["hit"]);
}

#[test]
fn the_same_bytes_heal_what_check_found() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    flip(&packs(dir.path())[0], 16 + 80 + 100);
    let mut store = open(dir.path());
    assert!(!check(&store).is_clean());
    // An index on disk remembers what was found bad.
    if cfg!(feature = "rocksdb") {
        drop(store);
        store = open(dir.path());
    }
    commit_bytes(&store, &bytes, "again");
    assert_eq!(read_all(&store, &image), bytes);
    let report = check(&store);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.healed_frames, 1);
    // The bad frame is needed by nobody, but its pack is put aside as well.
    let (repaired, left) = store.repair(&mut |_| {}).expect("a repair");
    assert_eq!((repaired.quarantined.len(), repaired.lost_frames), (1, 1));
    assert!(left.is_clean() && left.healed_frames == 0, "{left:?}");
    assert_eq!(read_all(&store, &image), bytes);
}

#[test]
fn a_pack_that_is_cut_short_keeps_its_whole_frames() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    let pack = packs(dir.path()).remove(0);
    // Tables and footer are gone; all frames are there.
    let len = std::fs::metadata(&pack).expect("the pack").len();
    let file = OpenOptions::new().write(true).open(&pack).expect("the pack");
    file.set_len(len - 50).expect("a cut");
    let store = open(dir.path());
    assert_eq!(read_all(&store, &image), bytes);
    let report = check(&store);
    assert!(!report.is_clean() && report.damages.iter().all(|damage| damage.snapshots.is_empty()));
}

#[test]
fn a_lost_root_log_is_written_again_from_the_packs() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    let before = open(dir.path()).snapshots();
    std::fs::remove_file(dir.path().join("roots.log")).expect("the log");
    let store = open(dir.path());
    assert_eq!(store.snapshots(), before);
    assert_eq!(read_all(&store, &image), bytes);
    assert!(check(&store).is_clean());
}

#[test]
fn damage_inside_the_root_log_is_told_from_a_torn_end() {
    let dir = tempfile::tempdir().expect("a folder");
    two_snapshots(dir.path());
    let log = dir.path().join("roots.log");
    let len = std::fs::metadata(&log).expect("the log").len();
    let open_raw = || {
        crate::common::open_as(
            dir.path(),
            &crate::common::settings(coppice_engine::IndexKind::Memory),
        )
    };
    for offset in (0..len / 2 - 8).step_by(7) {
        // One bit can be mended behind the header, two cannot.
        flip(&log, offset);
        flip(&log, offset + 1);
        let error = open_raw().expect_err("damage in the middle");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "at {offset}");
        flip(&log, offset);
        flip(&log, offset + 1);
    }
    let whole = std::fs::read(&log).expect("the log");
    let names = open_raw().expect("it opens").snapshots();
    for offset in 16..len {
        flip(&log, offset);
        assert_eq!(open_raw().expect("one bit is mended").snapshots(), names, "at {offset}");
        assert!(std::fs::read(&log).expect("the log") == whole, "at {offset}");
    }
    for cut in 1..200 {
        std::fs::write(&log, &whole[..whole.len() - cut]).expect("a write");
        let store = open_raw().expect("a torn end is no damage");
        assert_eq!(store.snapshots().len(), 1, "cut by {cut}");
    }
}

#[cfg(feature = "rocksdb")]
#[test]
fn the_index_can_be_thrown_away_or_ruined() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    std::fs::remove_dir_all(dir.path().join("index")).expect("the index");
    let store = open(dir.path());
    assert_eq!(read_all(&store, &image), bytes);
    assert!(check(&store).is_clean());
    drop(store);
    std::fs::write(dir.path().join("index/CURRENT"), "nonsense\n").expect("a write");
    let store = open(dir.path());
    assert_eq!(read_all(&store, &image), bytes);
    drop(store);
    // A pack that is gone takes its entries with it.
    std::fs::remove_file(&packs(dir.path())[1]).expect("a pack");
    let store = open(dir.path());
    assert_eq!(read_all(&store, &image), bytes);
    let report = check(&store);
    assert!(report.damages.iter().all(|damage| damage.snapshots.iter().eq(["spared"])));
    assert!(!report.is_clean());
    commit_bytes(&store, &noise(2, 10 * PAGE_LEN), "spared-again");
    assert!(check(&store).is_clean());
}

/// Where frames begin in a pack.
fn frames_of(pack: &Path) -> Vec<u64> {
    let bytes = std::fs::read(pack).expect("the pack");
    let begins = |at: &usize| bytes[*at..].starts_with(b"CPF1");
    (0..bytes.len()).filter(begins).map(|at| at as u64).collect()
}

/// The tables are ruined and the second frame is no frame any more: what lies
/// behind it can be read no longer, and the index must not go on naming it.
#[test]
fn a_repair_without_tables_leaves_no_entry_behind() {
    for also_frame in [false, true] {
        let dir = tempfile::tempdir().expect("a folder");
        let (bytes, image) = two_snapshots(dir.path());
        let store = open(dir.path());
        let pack = packs(dir.path()).remove(0);
        let len = std::fs::metadata(&pack).expect("the pack").len();
        if also_frame {
            flip(&pack, frames_of(&pack)[1]);
        }
        flip(&pack, len - 20);
        let (repaired, left) = store.repair(&mut |_| {}).expect("a repair");
        assert_eq!(repaired.quarantined.len(), 1);
        assert_eq!(left.is_clean(), !also_frame, "{left:?}");
        commit_bytes(&store, &bytes, "again");
        assert!(read_all(&store, &image) == bytes);
        assert!(check(&store).is_clean());
        drop(store);
        let store = open(dir.path());
        assert!(read_all(&store, &image) == bytes);
        assert!(check(&store).is_clean());
    }
}

/// The file of a pack goes, or cannot be read, while the store is open: the
/// check tells it, the repair makes the best of it, the same bytes heal it.
#[test]
fn a_pack_that_cannot_be_had_is_told_and_repaired() {
    for goes in [true, false] {
        let dir = tempfile::tempdir().expect("a folder");
        let (bytes, image) = two_snapshots(dir.path());
        let store = open(dir.path());
        let pack = packs(dir.path()).remove(0);
        std::fs::remove_file(&pack).expect("the pack");
        if !goes {
            std::fs::create_dir(&pack).expect("what cannot be read");
        }
        let report = check(&store);
        assert!(report.damages.iter().any(|damage| damage.pack.is_some()), "{report:?}");
        assert!(report.damages.iter().any(|damage| damage.snapshots.contains("hit")));
        let (repaired, left) = store.repair(&mut |_| {}).expect("a repair");
        assert_eq!(repaired.quarantined.len(), 1);
        assert!(left.damages.iter().all(|damage| damage.snapshots.iter().eq(["hit"])), "{left:?}");
        commit_bytes(&store, &bytes, "again");
        assert!(read_all(&store, &image) == bytes);
        assert!(check(&store).is_clean());
        drop(store);
        assert!(check(&open(dir.path())).is_clean());
    }
}

/// A hole behind the root log, as long as a file can be: nobody takes memory
/// for it, and it is cut off. So is a hole behind a pack.
#[test]
fn files_that_say_they_are_endless_take_no_memory() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    let log = dir.path().join("roots.log");
    let len = std::fs::metadata(&log).expect("the log").len();
    let file = OpenOptions::new().write(true).open(&log).expect("the log");
    file.set_len(256 << 20).expect("a hole");
    let store = open(dir.path());
    assert_eq!(std::fs::metadata(&log).expect("the log").len(), len);
    assert!(read_all(&store, &image) == bytes);
    drop(store);
    let pack = OpenOptions::new().write(true).open(&packs(dir.path())[0]).expect("a pack");
    pack.set_len(1 << 42).expect("a hole");
    let store = open(dir.path());
    assert!(read_all(&store, &image) == bytes);
    assert!(!check(&store).is_clean());
    let (repaired, left) = store.repair(&mut |_| {}).expect("a repair");
    assert_eq!(repaired.quarantined.len(), 1);
    assert!(left.is_clean(), "{left:?}");
    assert!(read_all(&store, &image) == bytes);
}

/// Files in the folder of packs that somebody put there: they are told, put
/// aside, and upset nobody.
#[test]
fn packs_that_somebody_put_there_upset_nobody() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    let folder = dir.path().join("packs");
    let first = std::fs::read(&packs(dir.path())[0]).expect("a pack");
    let strangers = [
        ("000000000100.pack", Vec::new()),
        ("000000000101.pack", noise(5, 10_000)),
        ("000000000102.pack", first.clone()),
        ("000000000103.pack", first[..first.len() / 2].to_vec()),
        ("000000000104.pack", [&first[..], &first[..]].concat()),
        ("000000000105.pack", vec![0; 200]),
        ("more.pack", noise(6, 100)),
    ];
    for (name, content) in &strangers {
        std::fs::write(folder.join(name), content).expect("a file");
    }
    let store = open(dir.path());
    assert!(read_all(&store, &image) == bytes);
    let report = check(&store);
    for number in 100..106 {
        let is_it = |pack: coppice_engine::PackId| pack.to_string() == format!("{number:012}");
        assert!(report.damages.iter().any(|it| it.pack.is_some_and(is_it)), "{number}");
    }
    let (repaired, left) = store.repair(&mut |_| {}).expect("a repair");
    assert_eq!(repaired.quarantined.len(), 6);
    assert!(left.is_clean(), "{left:?}");
    assert!(read_all(&store, &image) == bytes);
    commit_bytes(&store, &noise(8, 20 * PAGE_LEN), "next");
    drop(store);
    let store = open(dir.path());
    assert!(read_all(&store, &image) == bytes && check(&store).is_clean());
}

/// A pack with the last id that there is: nothing gets an id that has no name.
#[test]
fn pack_ids_that_are_used_up_are_told() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    std::fs::write(dir.path().join("packs/999999999999.pack"), [1; 64]).expect("a file");
    for _ in 0..2 {
        let store = open(dir.path());
        let mut session = store.begin().expect("a session");
        let new = session.blob(&noise(9, PAGE_LEN)).expect("an image");
        let record = crate::common::record_of(new);
        let error = session.commit(&record, crate::common::named("more")).expect_err("no id");
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("ids"), "{error}");
        assert!(store.lookup("more").is_err());
        assert!(read_all(&store, &image) == bytes);
    }
    let left = std::fs::read_dir(dir.path().join("packs")).expect("packs").count();
    assert_eq!(left, 3);
}

/// The index is built again while the disk does not give a pack: the others are
/// read, the loss is told, and it ends when the pack is back.
#[test]
fn a_pack_that_cannot_be_read_keeps_nobody_from_the_others() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image) = two_snapshots(dir.path());
    let (pack, aside) = (packs(dir.path()).remove(1), dir.path().join("aside"));
    std::fs::rename(&pack, &aside).expect("it moves");
    std::fs::create_dir(&pack).expect("what cannot be read");
    let settings = crate::common::settings(coppice_engine::IndexKind::Memory);
    let open_raw = || crate::common::open_as(dir.path(), &settings);
    let store = open_raw().expect("it opens");
    assert!(read_all(&store, &image) == bytes);
    let report = check(&store);
    let is_told = |damage: &coppice_engine::Damage| damage.problem.contains("left out at opening");
    assert!(report.damages.iter().any(is_told), "{report:?}");
    assert!(report.damages.iter().any(|damage| damage.snapshots.contains("spared")));
    assert_eq!(store.gc(Default::default()).expect_err("it is needed").kind(), ErrorKind::Corrupt);
    drop(store);
    // Nothing is made up from what is left.
    let log = dir.path().join("roots.log");
    std::fs::rename(&log, dir.path().join("log-aside")).expect("it moves");
    assert_eq!(open_raw().expect_err("a part is missing").kind(), ErrorKind::Unavailable);
    std::fs::rename(dir.path().join("log-aside"), &log).expect("it moves back");
    std::fs::remove_dir(&pack).expect("it goes");
    std::fs::rename(&aside, &pack).expect("it is back");
    let store = open_raw().expect("it opens");
    assert!(check(&store).is_clean());
    assert_eq!(store.snapshots().len(), 2);
}
