//! A disk that takes its time, and one that fails now and then: who only looks
//! waits for nobody, and what was not written is not called written.

use std::fs::File;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coppice_engine::{
    Access, CommitOptions, Disk, DiskFile, ErrorKind, Faults, GcOptions, IndexKind, Listed,
    PAGE_LEN, Settings, SimDisk, Store,
};

use crate::common::{commit_bytes, name, named, noise, read_all, record_of, settings};

/// So long a test waits for what should not have to wait at all.
const PATIENCE: Duration = Duration::from_secs(120);

/// A disk on which flushes of one file wait until they are let go.
#[derive(Debug)]
struct SlowDisk {
    below: SimDisk,
    slow: &'static str,
    gate: Arc<Mutex<Option<Gate>>>,
}

/// Says that a flush waits, and waits until it may go on.
#[derive(Debug)]
struct Gate {
    waits: SyncSender<()>,
    go: Receiver<()>,
}

#[derive(Debug)]
struct SlowFile {
    below: Box<dyn DiskFile>,
    gate: Option<Arc<Mutex<Option<Gate>>>>,
}

impl SlowDisk {
    fn file(&self, path: &str, below: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        let gate = path.contains(self.slow).then(|| Arc::clone(&self.gate));
        Box::new(SlowFile { below, gate })
    }
}

impl Disk for SlowDisk {
    fn create(&self, path: &str) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.file(path, self.below.create(path)?))
    }

    fn open(&self, path: &str, access: Access) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.file(path, self.below.open(path, access)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.below.rename(from, to)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.below.remove(path)
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Listed>> {
        self.below.list(dir)
    }

    fn make_dir(&self, dir: &str) -> io::Result<()> {
        self.below.make_dir(dir)
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.below.sync_dir(dir)
    }

    fn descriptor(&self, path: &str) -> io::Result<File> {
        self.below.descriptor(path)
    }
}

impl DiskFile for SlowFile {
    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.below.read_at(offset, len)
    }

    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.below.write_all_at(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        let gate = self.gate.as_ref().and_then(|gate| gate.lock().expect("a gate").take());
        if let Some(gate) = gate {
            gate.waits.send(()).expect("somebody listens");
            gate.go.recv().expect("it goes on");
        }
        self.below.sync()
    }

    fn length(&self) -> io::Result<u64> {
        self.below.length()
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.below.truncate(len)
    }
}

/// Lets `work` flush a file whose path contains `slow`, and meanwhile has
/// another thread do everything that only looks.
fn looks_meanwhile(slow: &'static str, work: fn(&Store)) {
    let gate: Arc<Mutex<Option<Gate>>> = Arc::default();
    let disk = SlowDisk { below: SimDisk::new(), slow, gate: Arc::clone(&gate) };
    let store = Store::open_on(Arc::new(disk), &settings(IndexKind::Memory)).expect("a store");
    let bytes = noise(1, 40 * PAGE_LEN);
    let image = commit_bytes(&store, &bytes, "kept");
    let (waits, waiting) = sync_channel(1);
    let (let_go, go) = sync_channel(1);
    *gate.lock().expect("a gate") = Some(Gate { waits, go });
    std::thread::scope(|scope| {
        scope.spawn(|| work(&store));
        waiting.recv_timeout(PATIENCE).expect("the flush is asked for");
        let (done, looked) = channel();
        let reader = store.clone();
        let expected = bytes.clone();
        std::thread::spawn(move || {
            assert_eq!(reader.lookup("kept").expect("it is there").names.len(), 1);
            assert_eq!(reader.snapshots().len(), 1);
            assert!(reader.stats().stored_bytes > 0);
            assert!(read_all(&reader, &image) == expected);
            assert!(reader.page_map(&image).expect("a map").stored_pages() == 40);
            drop(reader.lease(&[image]).expect("a lease"));
            drop(reader.begin().expect("a session"));
            done.send(()).expect("somebody listens");
        });
        let outcome = looked.recv_timeout(PATIENCE);
        let_go.send(()).expect("the flush waits");
        outcome.expect("who only looks waits for nobody");
    });
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
}

#[test]
fn nobody_who_looks_waits_for_the_root_log() {
    looks_meanwhile("roots", |store| {
        commit_bytes(store, &noise(2, PAGE_LEN), "next");
    });
    looks_meanwhile("roots", |store| drop(store.tag("kept", name("other")).expect("a tag")));
}

#[test]
fn nobody_who_looks_waits_for_a_pack() {
    looks_meanwhile("pack", |store| {
        commit_bytes(store, &noise(2, 99 * PAGE_LEN), "next");
    });
}

#[test]
fn a_snapshot_that_is_named_is_not_removed_by_its_id_at_the_same_time() {
    let store =
        Store::open_on(Arc::new(SimDisk::new()), &settings(IndexKind::Memory)).expect("a store");
    let mut outcomes = [0; 2];
    for round in 0..200_u64 {
        let mut session = store.begin().expect("a session");
        let image = session.blob(&round.to_le_bytes()).expect("an image");
        let done = session.commit(&record_of(image), CommitOptions::default()).expect("a commit");
        let id = done.id.to_string();
        let as_name = format!("n{round}");
        let (tagged, removed) = std::thread::scope(|scope| {
            let tag = scope.spawn(|| store.tag(&id, name(&as_name)));
            let remove = scope.spawn(|| store.remove(&id));
            (tag.join().expect("a thread"), remove.join().expect("a thread"))
        });
        // Either it was named first and refuses to go, or it is gone.
        assert!(tagged.is_ok() != removed.is_ok(), "{round}: {tagged:?} {removed:?}");
        assert_eq!(store.lookup(&as_name).is_ok(), tagged.is_ok(), "{round}");
        outcomes[usize::from(tagged.is_ok())] += 1;
    }
    assert_eq!(outcomes[0] + outcomes[1], 200);
}

/// Every read fails once while a child of an image is written, by somebody who
/// does not listen to errors but asks for a commit in the end.
#[test]
fn a_write_that_failed_is_not_committed_by_who_did_not_listen() {
    let (mut failed, mut refused) = (0, 0);
    // Each node in a frame of its own, so that each costs a read.
    let settings = Settings { frame_len_max: PAGE_LEN, ..settings(IndexKind::Memory) };
    for at in 0.. {
        let disk = SimDisk::new();
        let open = || Store::open_on(Arc::new(disk.clone()), &settings);
        let mut bytes = noise(1, 600 * PAGE_LEN);
        let base = commit_bytes(&open().expect("a store"), &bytes, "base");
        let store = open().expect("a store");
        let failing = disk.counts().reads + at;
        disk.set_faults(Faults { fail_read: Some((failing, 5)), ..Faults::default() });
        let Ok(mut session) = store.begin() else { continue };
        let Ok(mut writer) = session.image(bytes.len() as u64, Some(&base)) else { continue };
        let mut heard = false;
        for page in [3, 200, 400, 599] {
            let new = noise(page, PAGE_LEN);
            let place = usize::try_from(page).expect("small") * PAGE_LEN;
            bytes[place..place + PAGE_LEN].copy_from_slice(&new);
            heard |= writer.write(page, &new).is_err();
        }
        let image = writer.finish();
        heard |= image.is_err();
        let committed = session.commit(&record_of(image.unwrap_or(base)), named("child"));
        let tried = disk.counts().reads > failing;
        disk.set_faults(Faults::default());
        if committed.is_ok() {
            assert!(!heard, "read {at}");
            let child = store.lookup("child").expect("it is there").record.images[0].1;
            assert!(read_all(&store, &child) == bytes, "read {at}");
            if !tried {
                break;
            }
        } else {
            refused += usize::from(heard);
        }
        failed += 1;
        assert!(failed < 1000);
    }
    crate::tried(failed, &format!("failed reads of a session; {refused} commits refused"));
    assert!(refused > 2, "{refused}");
}

/// A reader that opens packs all the time keeps none that is gone.
#[test]
fn a_collected_pack_is_not_kept_open() {
    let disk = SimDisk::new();
    let store =
        Store::open_on(Arc::new(disk.clone()), &settings(IndexKind::Memory)).expect("a store");
    let kept = noise(1, 20 * PAGE_LEN);
    let image = commit_bytes(&store, &kept, "kept");
    for round in 0..20_u64 {
        commit_bytes(&store, &noise(100 + round, 5 * PAGE_LEN), "gone");
        store.remove("gone").expect("it is removed");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert!(read_all(&store, &image) == kept);
                }
            });
            store.gc(GcOptions::default()).expect("a collection");
        });
    }
    let error = store.lookup("gone").expect_err("it is gone");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(disk.list("packs").expect("packs").len(), 1);
}
