//! A simulated disk in memory, which forgets what was not flushed.
//!
//! It counts writes and flushes, fails or stops at a given one, and after a
//! power cut gives a disk with what may have survived: everything flushed, and
//! of the rest some writes, some of them torn, and some of the name changes.
//! One seed decides, so every run can be repeated.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use super::{Access, Disk, DiskFile, Listed, Room};
use crate::env::lock;
use crate::units::{to_u64, to_usize};

/// A disk without room.
const ENOSPC: i32 = 28;

/// What goes wrong, and when. Counting begins at zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// The power goes when this flush is asked for.
    pub stop_at_sync: Option<u64>,
    /// This flush fails, once.
    pub fail_sync: Option<u64>,
    /// This write, creation or renaming fails with this error number, once.
    pub fail_write: Option<(u64, i32)>,
    /// This read or opening of a file fails with this error number, once.
    pub fail_read: Option<(u64, i32)>,
}

/// How much was asked of a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Flushes of files and folders.
    pub syncs: u64,
    /// Writes, creations and renamings.
    pub writes: u64,
    /// Reads and openings of files.
    pub reads: u64,
}

/// The disk. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    files: Vec<Content>,
    names: Names,
    durable_names: Names,
    /// Changes of names since their folder was flushed.
    changes: Vec<Change>,
    faults: Faults,
    counts: Counts,
    stopped: bool,
    /// Bytes that its files may have together, if that is limited.
    capacity: Option<u64>,
}

/// Names of files by path, and folders.
#[derive(Debug, Default, Clone)]
struct Names {
    files: BTreeMap<String, usize>,
    dirs: BTreeSet<String>,
}

#[derive(Debug, Default, Clone)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Changes since the last flush.
    changes: Vec<Edit>,
}

#[derive(Debug, Clone)]
enum Edit {
    Write(usize, Vec<u8>),
    Truncate(usize),
}

#[derive(Debug, Clone)]
enum Change {
    Create(String, usize),
    Rename(String, String, usize),
    Remove(String),
    MakeDir(String),
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Truncate(len) => bytes.resize(*len, 0),
            Self::Write(at, new) => {
                if bytes.len() < at + new.len() {
                    bytes.resize(at + new.len(), 0);
                }
                bytes[*at..at + new.len()].copy_from_slice(new);
            }
        }
    }

    /// Only the first bytes of a write reached the disk.
    fn torn(&self, random: &mut Random) -> Self {
        match self {
            Self::Write(at, new) => {
                let kept = random.below(to_u64(new.len()) + 1);
                Self::Write(*at, new[..to_usize(kept)].to_vec())
            }
            Self::Truncate(len) => Self::Truncate(*len),
        }
    }
}

impl Change {
    /// The folder whose flush makes it durable.
    fn dir(&self) -> &str {
        let (Self::Create(path, _)
        | Self::Rename(_, path, _)
        | Self::Remove(path)
        | Self::MakeDir(path)) = self;
        path.rsplit_once('/').map_or("", |(dir, _)| dir)
    }

    fn apply(&self, names: &mut Names) {
        match self {
            Self::Create(path, file) => {
                names.files.insert(path.clone(), *file);
            }
            Self::Remove(path) => {
                names.files.remove(path);
            }
            Self::MakeDir(dir) => {
                names.dirs.insert(dir.clone());
            }
            Self::Rename(from, to, file) => {
                names.files.remove(from);
                names.files.insert(to.clone(), *file);
            }
        }
    }
}

/// A small generator; the same seed gives the same numbers.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        // SplitMix64, by Sebastiano Vigna (public domain).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

fn power_cut() -> io::Error {
    io::Error::other("the power is gone")
}

impl State {
    fn running(&self) -> io::Result<()> {
        if self.stopped { Err(power_cut()) } else { Ok(()) }
    }

    fn count_write(&mut self) -> io::Result<()> {
        self.running()?;
        let number = self.counts.writes;
        self.counts.writes += 1;
        match self.faults.fail_write {
            Some((failing, errno)) if failing == number => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }

    fn count_read(&mut self) -> io::Result<()> {
        self.running()?;
        let number = self.counts.reads;
        self.counts.reads += 1;
        match self.faults.fail_read {
            Some((failing, errno)) if failing == number => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }

    fn count_sync(&mut self) -> io::Result<()> {
        self.running()?;
        let number = self.counts.syncs;
        self.counts.syncs += 1;
        if self.faults.stop_at_sync == Some(number) {
            self.stopped = true;
            return Err(power_cut());
        }
        if self.faults.fail_sync == Some(number) {
            return Err(io::Error::other("the flush failed"));
        }
        Ok(())
    }

    /// Bytes of all files that have a name.
    fn used(&self) -> u64 {
        self.names.files.values().map(|file| to_u64(self.files[*file].now.len())).sum()
    }

    /// Whether a file may become this long.
    fn has_room(&self, file: usize, len: usize) -> bool {
        let more = to_u64(len.saturating_sub(self.files[file].now.len()));
        self.capacity.is_none_or(|capacity| self.used() + more <= capacity)
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.names);
        self.changes.push(change);
    }

    fn find(&self, path: &str) -> io::Result<usize> {
        self.running()?;
        self.names.files.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl SimDisk {
    /// An empty disk without faults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what goes wrong from now on; counts go on.
    pub fn set_faults(&self, faults: Faults) {
        lock(&self.state).faults = faults;
    }

    /// Limits the bytes of all files together. A disk that is full takes new
    /// names, but no byte.
    pub fn set_capacity(&self, capacity: Option<u64>) {
        lock(&self.state).capacity = capacity;
    }

    /// What was asked so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        lock(&self.state).counts
    }

    /// What may be left after the power went. Of four seeds in a row one
    /// leaves nothing that was not flushed, and one everything but the end of
    /// each file's last write; the others leave any part of it.
    #[must_use]
    pub fn after_power_cut(&self, seed: u64) -> Self {
        let state = lock(&self.state);
        let mut random = Random(seed);
        let mut names = state.durable_names.clone();
        let changes = to_u64(state.changes.len());
        let (kept, survivor): (u64, Survivor) = match seed % 4 {
            0 => (0, clean),
            1 => (changes, torn),
            _ => (random.below(changes + 1), reordered),
        };
        state.changes[..to_usize(kept)].iter().for_each(|change| change.apply(&mut names));
        let files = state.files.iter().map(|file| survivor(file, &mut random)).collect();
        let capacity = state.capacity;
        let durable_names = names.clone();
        let left = State { files, names, durable_names, capacity, ..State::default() };
        Self { state: Arc::new(Mutex::new(left)) }
    }
}

/// What becomes of a file in a power cut.
type Survivor = fn(&Content, &mut Random) -> Content;

/// Nothing that was not flushed got there.
fn clean(file: &Content, _: &mut Random) -> Content {
    Content { now: file.durable.clone(), durable: file.durable.clone(), changes: Vec::new() }
}

/// Everything got there but the end of the last write.
fn torn(file: &Content, random: &mut Random) -> Content {
    let mut bytes = file.durable.clone();
    if let Some((last, before)) = file.changes.split_last() {
        before.iter().for_each(|edit| edit.apply(&mut bytes));
        last.torn(random).apply(&mut bytes);
    }
    Content { now: bytes.clone(), durable: bytes, changes: Vec::new() }
}

/// Unflushed writes got there in any combination, some of them torn.
fn reordered(file: &Content, random: &mut Random) -> Content {
    let mut bytes = file.durable.clone();
    for edit in &file.changes {
        match random.below(3) {
            0 => {}
            1 => edit.apply(&mut bytes),
            _ => edit.torn(random).apply(&mut bytes),
        }
    }
    Content { now: bytes.clone(), durable: bytes, changes: Vec::new() }
}

impl Disk for SimDisk {
    fn create(&self, path: &str) -> io::Result<Box<dyn DiskFile>> {
        let mut state = lock(&self.state);
        state.count_write()?;
        if state.names.files.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.files.push(Content::default());
        let file = state.files.len() - 1;
        state.change(Change::Create(path.to_owned(), file));
        drop(state);
        Ok(Box::new(SimFile { disk: self.clone(), file }))
    }

    fn open(&self, path: &str, _: Access) -> io::Result<Box<dyn DiskFile>> {
        let mut state = lock(&self.state);
        state.count_read()?;
        let file = state.find(path)?;
        drop(state);
        Ok(Box::new(SimFile { disk: self.clone(), file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.count_write()?;
        let file = state.find(from)?;
        state.change(Change::Rename(from.to_owned(), to.to_owned(), file));
        Ok(())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.find(path)?;
        state.change(Change::Remove(path.to_owned()));
        Ok(())
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Listed>> {
        let state = lock(&self.state);
        state.running()?;
        if !dir.is_empty() && !state.names.dirs.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let inside = |path: &str| match path.rsplit_once('/') {
            Some((parent, name)) => (parent == dir).then(|| name.to_owned()),
            None => dir.is_empty().then(|| path.to_owned()),
        };
        let files = state.names.files.iter().filter_map(|(path, file)| {
            Some(Listed { name: inside(path)?, len: to_u64(state.files[*file].now.len()) })
        });
        Ok(files.collect())
    }

    fn make_dir(&self, dir: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.running()?;
        if !state.names.dirs.contains(dir) {
            state.change(Change::MakeDir(dir.to_owned()));
        }
        Ok(())
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.count_sync()?;
        let (durable, rest) =
            std::mem::take(&mut state.changes).into_iter().partition(|change| change.dir() == dir);
        state.changes = rest;
        let durable: Vec<Change> = durable;
        durable.iter().for_each(|change| change.apply(&mut state.durable_names));
        Ok(())
    }

    fn room(&self) -> io::Result<Option<Room>> {
        let state = lock(&self.state);
        let room =
            |capacity: u64| Room { capacity, available: capacity.saturating_sub(state.used()) };
        Ok(state.capacity.map(room))
    }

    fn descriptor(&self, _: &str) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    file: usize,
}

impl DiskFile for SimFile {
    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut state = lock(&self.disk.state);
        state.count_read()?;
        let start = to_usize(offset);
        let bytes =
            start.checked_add(len).and_then(|end| state.files[self.file].now.get(start..end));
        bytes.map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.disk.state);
        let mut outcome = state.count_write();
        if outcome.is_ok() && !state.has_room(self.file, to_usize(offset) + bytes.len()) {
            outcome = Err(io::Error::from_raw_os_error(ENOSPC));
        }
        // A write that fails may have reached the file in part.
        let kept = if outcome.is_ok() { bytes } else { &bytes[..bytes.len() / 2] };
        state.running()?;
        if !state.has_room(self.file, to_usize(offset) + kept.len()) {
            return outcome;
        }
        let file = &mut state.files[self.file];
        let edit = Edit::Write(to_usize(offset), kept.to_vec());
        edit.apply(&mut file.now);
        file.changes.push(edit);
        outcome
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = lock(&self.disk.state);
        state.count_sync()?;
        let file = &mut state.files[self.file];
        file.durable.clone_from(&file.now);
        file.changes.clear();
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        let state = lock(&self.disk.state);
        state.running()?;
        Ok(to_u64(state.files[self.file].now.len()))
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        let mut state = lock(&self.disk.state);
        state.running()?;
        let file = &mut state.files[self.file];
        let edit = Edit::Truncate(to_usize(len));
        edit.apply(&mut file.now);
        file.changes.push(edit);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_flushed_survives_every_power_cut() {
        let disk = SimDisk::new();
        let file = disk.create("a").expect("a file");
        file.write_all_at(0, b"kept").expect("a write");
        file.sync().expect("a flush");
        disk.sync_dir("").expect("a flush");
        file.write_all_at(4, b"maybe").expect("a write");
        let mut lengths = BTreeSet::new();
        for seed in 0..50 {
            let left = disk.after_power_cut(seed);
            let file = left.open("a", Access::Read).expect("the file");
            assert_eq!(file.read_at(0, 4).expect("a read"), b"kept");
            lengths.insert(file.length().expect("a length"));
        }
        assert!(lengths.len() > 3, "torn in several ways: {lengths:?}");
    }

    #[test]
    fn names_need_their_folder_flushed() {
        let disk = SimDisk::new();
        disk.create("a").expect("a file").sync().expect("a flush");
        let seen: BTreeSet<bool> = (0..50)
            .map(|seed| disk.after_power_cut(seed).open("a", Access::Read).is_ok())
            .collect();
        assert_eq!(seen.len(), 2);
    }
}
