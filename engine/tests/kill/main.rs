//! The process that owns a store is killed at random moments of a life of
//! commits, names, removals and collections, with RocksDB as the index.
//!
//! A program of its own: a child that is being started holds, for an instant,
//! the locks of every store that is open beside it.

#![cfg(feature = "rocksdb")]

#[expect(dead_code, reason = "not all of it is used here")]
#[path = "../store/common.rs"]
mod common;
#[path = "../told/mod.rs"]
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use coppice_engine::{GcOptions, PAGE_LEN, Role, Settings, Store};

use common::{named, noise, read_all, record_of, settings, soft_pages};

const FOLDER: &str = "COPPICE_TEST_KILL_FOLDER";
const SEED: &str = "COPPICE_TEST_KILL_SEED";
/// How often the process is killed; `COPPICE_LONG` asks for more.
const ROUNDS: u64 = 20;
const ROUNDS_LONG: u64 = 400;
const PAGES: usize = 150;

fn store_settings() -> Settings {
    Settings { pack_objects_max: 200, ..settings(Settings::default().index) }
}

/// What the snapshot of this number holds: something of its own, and much
/// that others have.
fn bytes_of(number: u64) -> Vec<u8> {
    let mut bytes = soft_pages(number % 4, PAGES);
    let at = usize::try_from(number % 100).expect("small") * PAGE_LEN;
    bytes[at..at + 20 * PAGE_LEN].copy_from_slice(&noise(number + 1, 20 * PAGE_LEN));
    bytes
}

/// The same a byte further on, as a byte stream.
fn stream_of(number: u64) -> Vec<u8> {
    [&[7], &bytes_of(number)[..]].concat()
}

fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

/// The life that is ended from outside. Each step is told before and after.
#[test]
#[ignore = "run by `a_process_killed_at_any_moment_loses_nothing`"]
fn the_life() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let mut random: u64 = std::env::var(SEED).expect("a seed").parse().expect("a number");
    let folder = Path::new(&folder);
    let mut diary =
        OpenOptions::new().append(true).create(true).open(folder.join("diary")).expect("a diary");
    let store = common::open_as(&folder.join("store"), &store_settings()).expect("it opens");
    loop {
        let names: Vec<String> =
            store.snapshots().iter().flat_map(|e| &e.names).map(ToString::to_string).collect();
        match next(&mut random) % 8 {
            0 | 1 if names.len() > 3 => {
                let at = usize::try_from(next(&mut random)).expect("64 bits") % names.len();
                tell(&mut diary, &format!("remove {}", names[at]));
                store.remove(&names[at]).expect("it is removed");
            }
            3 if !names.is_empty() => {
                let at = usize::try_from(next(&mut random)).expect("64 bits") % names.len();
                let new = format!("{}-{}", number_of(&names[at]), next(&mut random) % 1000);
                if names.contains(&format!("s{new}")) {
                    continue;
                }
                // A name more is told as a commit is.
                tell(&mut diary, &format!("commit s{new}"));
                store.tag(&names[at], common::name(&format!("s{new}"))).expect("a tag");
            }
            2 => {
                tell(&mut diary, "collect");
                let dead_percent_min = if next(&mut random).is_multiple_of(2) { 0 } else { 25 };
                store
                    .gc(GcOptions { dead_percent_min, frames_percent_max: 110 })
                    .expect("a collection");
            }
            _ => {
                let number = next(&mut random) % 1_000_000;
                let as_name = format!("s{number}");
                if names.contains(&as_name) {
                    continue;
                }
                tell(&mut diary, &format!("commit {as_name}"));
                commit(&store, number, &as_name);
            }
        }
        tell(&mut diary, "done");
    }
}

/// The number of the snapshot that has a name: `s17`, or `s17-4`.
fn number_of(name: &str) -> u64 {
    let number = name[1..].split('-').next().expect("a part");
    number.parse().expect("a number")
}

fn tell(diary: &mut File, line: &str) {
    diary.write_all(format!("{line}\n").as_bytes()).expect("a line");
}

/// On a base if there is one, so that nodes are patched.
fn commit(store: &Store, number: u64, as_name: &str) {
    let bytes = bytes_of(number);
    let base = store.snapshots().last().and_then(|e| e.record.image(Role::Memory).copied());
    let mut session = store.begin().expect("a session");
    let mut writer = session.image(bytes.len() as u64, base.as_ref()).expect("an image");
    writer.write(0, &bytes).expect("a write");
    let image = writer.finish().expect("an image");
    let mut writer = session.stream();
    writer.append(&stream_of(number)).expect("a stream");
    let mut record = record_of(image);
    record.images.push((Role::Stream, writer.finish().expect("an image")));
    session.commit(&record, named(as_name)).expect("a commit");
}

/// What the diary promises, and the step under way.
fn promised(diary: &str) -> (BTreeSet<String>, Option<String>) {
    let mut names = BTreeSet::new();
    let mut open: Option<&str> = None;
    for line in diary.lines() {
        if line != "done" {
            // A step that was under way when the process was killed.
            open = Some(line);
            continue;
        }
        match open.take().and_then(|step| step.split_once(' ')) {
            Some(("commit", name)) => drop(names.insert(name.to_owned())),
            Some(("remove", name)) => drop(names.remove(name)),
            _ => {}
        }
    }
    (names, open.map(str::to_owned))
}

fn verify(folder: &Path) -> BTreeSet<String> {
    let diary = std::fs::read_to_string(folder.join("diary")).unwrap_or_default();
    let (mut names, open) = promised(&diary);
    let store = common::open_as(&folder.join("store"), &store_settings()).expect("it opens");
    let found: BTreeMap<String, _> = store
        .snapshots()
        .iter()
        .flat_map(|entry| entry.names.iter().map(|name| (name.to_string(), entry.record.clone())))
        .collect();
    match open.as_deref().and_then(|step| step.split_once(' ')) {
        Some(("commit", name)) if found.contains_key(name) => drop(names.insert(name.to_owned())),
        Some(("remove", name)) if !found.contains_key(name) => drop(names.remove(name)),
        _ => {}
    }
    let listed: BTreeSet<String> = found.keys().cloned().collect();
    assert_eq!(listed, names, "after {open:?}");
    for (as_name, record) in &found {
        let number = number_of(as_name);
        let image = record.image(Role::Memory).expect("memory");
        assert!(read_all(&store, image) == bytes_of(number), "{as_name}");
        let stream = record.image(Role::Stream).expect("a stream");
        assert!(read_all(&store, stream) == stream_of(number), "{as_name}");
    }
    let report = store.check(&mut |_| {}).expect("a check");
    assert!(report.is_clean(), "{report:?}");
    names
}

#[test]
fn a_process_killed_at_any_moment_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let rounds = if std::env::var_os("COPPICE_LONG").is_some() { ROUNDS_LONG } else { ROUNDS };
    let mut random = 0x5eed_u64;
    let mut snapshots = 0;
    for round in 0..rounds {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "the_life", "--ignored"])
            .env(FOLDER, folder.path())
            .env(SEED, (round + 1).to_string())
            .stdout(Stdio::null())
            .spawn()
            .expect("the life begins");
        std::thread::sleep(Duration::from_millis(20 + next(&mut random) % 300));
        child.kill().expect("it is killed");
        let status = child.wait().expect("it ends");
        assert_eq!(status.signal(), Some(9), "it ended by itself: {status}");
        snapshots = verify(folder.path()).len();
        // What is verified is the beginning of the next round's diary.
        let names = verify(folder.path());
        let diary: String = names.iter().map(|name| format!("commit {name}\ndone\n")).collect();
        std::fs::write(folder.path().join("diary"), diary).expect("a diary");
    }
    told::tried(rounds, &format!("kills of a process; {snapshots} snapshots at the end"));
    assert!(snapshots > 0);
}
