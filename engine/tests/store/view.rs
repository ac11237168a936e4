//! Opening a store for reading only: on media that cannot be written, and
//! beside an owner that goes on committing, removing and collecting.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use coppice_engine::{ErrorKind, GcOptions, IndexKind, PAGE_LEN, Role, Settings, Store};

use crate::common::{commit_bytes, name, named, noise, open, read_all, settings, soft_pages};

const ALL: GcOptions = GcOptions { dead_percent_min: 0, frames_percent_max: 100 };

fn look(dir: &Path) -> Store {
    Store::open_read_only(dir, &settings(Settings::default().index)).expect("it can be looked at")
}

/// Every file with its length and when it changed last.
fn files(dir: &Path) -> BTreeMap<PathBuf, (u64, SystemTime)> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        let metadata = std::fs::metadata(&path).expect("it is there");
        all.insert(path.clone(), (metadata.len(), metadata.modified().expect("a time")));
        if metadata.is_dir() {
            all.extend(files(&path));
        }
    }
    all
}

fn names(store: &Store) -> Vec<String> {
    store.snapshots().iter().flat_map(|entry| &entry.names).map(ToString::to_string).collect()
}

fn refuses_to_write(view: &Store) {
    let refusals = [
        view.begin().map(drop).expect_err("no session"),
        view.remove("kept").map(drop).expect_err("no removal"),
        view.tag("kept", name("other")).map(drop).expect_err("no name"),
        view.gc(ALL).map(drop).expect_err("no collection"),
        view.repair(&mut |_| {}).map(drop).expect_err("no repair"),
    ];
    for refusal in refusals {
        assert_eq!(refusal.kind(), ErrorKind::Invalid, "{refusal}");
        assert!(refusal.to_string().contains("reading only"), "{refusal}");
    }
}

#[test]
fn a_view_stays_as_it_was_whatever_the_owner_does() {
    let dir = tempfile::tempdir().expect("a folder");
    let owner = open(dir.path());
    let (kept_bytes, gone_bytes) = (soft_pages(1, 300), noise(2, 200 * PAGE_LEN));
    let kept = commit_bytes(&owner, &kept_bytes, "kept");
    let gone = commit_bytes(&owner, &gone_bytes, "gone");
    let view = look(dir.path());
    owner.remove("gone").expect("it is removed");
    assert!(owner.gc(ALL).expect("a collection").dropped_packs > 0);
    let later = commit_bytes(&owner, &soft_pages(3, 100), "later");
    assert_eq!(names(&view), ["kept", "gone"]);
    for (image, bytes) in [(&kept, &kept_bytes), (&gone, &gone_bytes)] {
        assert!(read_all(&view, image) == *bytes);
    }
    assert!(view.check(&mut |_| {}).expect("a check").is_clean());
    assert!(view.reader(&later).is_err());
    refuses_to_write(&view);

    let now = look(dir.path());
    assert_eq!(names(&now), ["kept", "later"]);
    assert!(read_all(&now, &kept) == kept_bytes);
    assert!(now.check(&mut |_| {}).expect("a check").is_clean());
    let error = now.reader(&gone).map(drop).expect_err("it was collected");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(owner.check(&mut |_| {}).expect("a check").is_clean());
}

/// A file system that cannot be written, if this process may make one.
struct ReadOnlyMount(PathBuf);

impl ReadOnlyMount {
    fn of(dir: &Path) -> Option<Self> {
        let run = |arguments: &[&str]| {
            let mut mount = Command::new("mount");
            mount.args(arguments).arg(dir).status().is_ok_and(|status| status.success())
        };
        let text = dir.to_str().expect("a plain path");
        if !run(&["--bind", text]) {
            return None;
        }
        let mounted = Self(dir.to_owned());
        run(&["-o", "remount,bind,ro"]).then_some(mounted)
    }
}

impl Drop for ReadOnlyMount {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "it is unmounted");
    }
}

/// Opens a store that nobody owns, and sees that nothing was touched.
fn looks_without_a_trace(dir: &Path, image: &coppice_engine::ImageRef, bytes: &[u8]) {
    let before = files(dir);
    let mount = ReadOnlyMount::of(dir);
    if mount.is_none() {
        eprintln!("skipped in part: cannot mount a folder read-only");
    }
    let view = look(dir);
    assert_eq!(names(&view), ["kept", "also"]);
    assert!(read_all(&view, image) == bytes);
    assert!(view.check(&mut |_| {}).expect("a check").is_clean());
    refuses_to_write(&view);
    drop(view);
    drop(mount);
    assert_eq!(files(dir), before);
}

#[test]
fn a_store_on_read_only_media_is_read_without_a_trace() {
    let dir = tempfile::tempdir().expect("a folder");
    let bytes = soft_pages(1, 300);
    let store = open(dir.path());
    let image = commit_bytes(&store, &bytes, "kept");
    commit_bytes(&store, &soft_pages(2, 50), "also");
    drop(store);
    looks_without_a_trace(dir.path(), &image, &bytes);
    // A bit of the root log is wrong: it is read as mended, and left alone.
    let log = dir.path().join("roots.log");
    let mut damaged = std::fs::read(&log).expect("the log");
    damaged[100] ^= 4;
    std::fs::write(&log, &damaged).expect("a flip");
    looks_without_a_trace(dir.path(), &image, &bytes);
    // Without an index, without a root log, and with an index that is none.
    std::fs::remove_dir_all(dir.path().join("index")).expect("no index");
    looks_without_a_trace(dir.path(), &image, &bytes);
    std::fs::remove_file(&log).expect("no log");
    looks_without_a_trace(dir.path(), &image, &bytes);
    std::fs::create_dir(dir.path().join("index")).expect("a folder");
    std::fs::write(dir.path().join("index/CURRENT"), "nonsense").expect("a file");
    looks_without_a_trace(dir.path(), &image, &bytes);
}

#[test]
fn what_is_no_store_is_not_looked_at() {
    let dir = tempfile::tempdir().expect("a folder");
    let look = |dir: &Path| Store::open_read_only(dir, &settings(IndexKind::Memory));
    assert_eq!(look(dir.path()).map(drop).expect_err("empty").kind(), ErrorKind::Invalid);
    assert!(look(&dir.path().join("absent")).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).expect("a folder").count(), 0);
}

/// The bytes of a snapshot, by its number.
fn bytes_of(number: u64) -> Vec<u8> {
    let mut bytes = soft_pages(number % 3, 40);
    bytes.extend(noise(number + 1, 20 * PAGE_LEN));
    bytes
}

#[test]
fn views_are_whole_at_any_moment_of_an_owners_life() {
    let dir = tempfile::tempdir().expect("a folder");
    let settings = Settings { pack_objects_max: 50, ..settings(Settings::default().index) };
    let owner = crate::common::open_as(dir.path(), &settings).expect("a store");
    let done = AtomicBool::new(false);
    let (views, snapshots) = std::thread::scope(|scope| {
        let viewer = scope.spawn(|| {
            let (mut views, mut snapshots) = (0, 0);
            while !done.load(Ordering::Acquire) {
                let view = Store::open_read_only(dir.path(), &settings).expect("a view");
                for entry in view.snapshots() {
                    let named = entry.names.first().expect("a name").to_string();
                    let number = named[1..].parse().expect("a number");
                    let image = entry.record.image(Role::Memory).expect("memory");
                    assert!(read_all(&view, image) == bytes_of(number), "{named}");
                    snapshots += 1;
                }
                views += 1;
            }
            (views, snapshots)
        });
        for number in 0..80_u64 {
            let bytes = bytes_of(number);
            let mut session = owner.begin().expect("a session");
            let mut writer = session.image(bytes.len() as u64, None).expect("an image");
            writer.write(0, &bytes).expect("a write");
            let image = writer.finish().expect("an image");
            let record = crate::common::record_of(image);
            session.commit(&record, named(&format!("s{number}"))).expect("a commit");
            if number >= 3 {
                owner.remove(&format!("s{}", number - 3)).expect("it is removed");
            }
            if number % 4 == 3 {
                owner.gc(ALL).expect("a collection");
            }
        }
        done.store(true, Ordering::Release);
        viewer.join().expect("the viewer")
    });
    println!("{views} views with {snapshots} snapshots beside 80 commits and 20 collections");
    assert!(views > 0);
}
