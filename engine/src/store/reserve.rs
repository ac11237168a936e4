//! The reserve: room that a store sets aside while there is some, so that a
//! disk that is full can be cleared. Removing a snapshot appends to the root
//! log, and a collection needs the index to forget a pack durably before the
//! pack's file goes; on a disk without a free block neither could begin.
//!
//! It is a file without content. Who frees space, or opens the store, and finds
//! no room gives it back and tries again; nothing else touches it. It is set
//! aside anew before something is written next, if there is room for twice as
//! much.

use crate::error::{ErrorKind, StoreError};
use crate::io::{Disk, Room};

/// Its file.
const PATH: &str = "reserve";
/// A small disk gives as much, which is what opening the index takes.
const LEN_MIN: u64 = 2 << 20;
/// What the index takes to write all that it holds in memory.
const LEN_MAX: u64 = 64 << 20;
/// Of a disk in between, one part of so many.
const SHARE: u64 = 64;
/// A smaller disk has none to spare.
const CAPACITY_MIN: u64 = 16 << 20;

/// How much a disk of this size has set aside; `None` if it is too small.
fn wanted(capacity: u64) -> Option<u64> {
    (capacity >= CAPACITY_MIN).then(|| (capacity / SHARE).clamp(LEN_MIN, LEN_MAX) / 4096 * 4096)
}

/// Sets the room aside unless that was done, or there is too little. That it
/// cannot be is no error: the store works without.
pub(super) fn keep(disk: &dyn Disk) {
    if let Err(error) = try_keep(disk) {
        tracing::debug!(%error, "no room is set aside");
    }
}

fn try_keep(disk: &dyn Disk) -> std::io::Result<()> {
    let Some(Room { capacity, available }) = disk.room()? else { return Ok(()) };
    let Some(len) = wanted(capacity) else { return Ok(()) };
    match disk.list("")?.iter().find(|file| file.name == PATH) {
        Some(file) if file.len >= len => return Ok(()),
        _ if available < 2 * len => return Ok(()),
        // Whoever made it ended before it had its room.
        Some(_) => disk.remove(PATH)?,
        None => {}
    }
    disk.set_aside(PATH, len)
}

/// Gives the room back; says whether there was any.
fn give_back(disk: &dyn Disk) -> bool {
    let given = disk.remove(PATH).is_ok();
    if given {
        tracing::warn!("the disk is full: the room that was set aside for this is given back");
    }
    given
}

fn has_room(disk: &dyn Disk) -> bool {
    disk.room().ok().flatten().is_some_and(|room| room.available >= LEN_MIN)
}

/// Does something that must be possible on a full disk: with the room that was
/// set aside if there is no other.
pub(super) fn with<T>(
    disk: &dyn Disk,
    mut work: impl FnMut() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    match work() {
        // Somebody else may just have given it back.
        Err(error) if error.kind() == ErrorKind::NoSpace && (give_back(disk) || has_room(disk)) => {
            work()
        }
        done => done,
    }
}

/// Gives the room back if less than that is left otherwise; says whether it
/// did.
pub(super) fn give_back_if_short(disk: &dyn Disk) -> bool {
    let short = |room: Room| wanted(room.capacity).is_some_and(|len| room.available < len);
    disk.room().ok().flatten().is_some_and(short) && give_back(disk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::SimDisk;

    fn len(disk: &SimDisk) -> Option<u64> {
        let files = disk.list("").expect("a list");
        files.iter().find(|file| file.name == PATH).map(|file| file.len)
    }

    #[test]
    fn a_share_of_the_disk_is_set_aside() {
        assert_eq!(wanted(8 << 20), None);
        assert_eq!(wanted(24 << 20), Some(2 << 20));
        assert_eq!(wanted(1 << 30), Some(16 << 20));
        assert_eq!(wanted(1 << 40), Some(64 << 20));
    }

    #[test]
    fn one_that_has_no_room_is_made_anew() {
        let disk = SimDisk::new();
        disk.set_capacity(Some(32 << 20));
        disk.create(PATH).expect("a file");
        keep(&disk);
        assert_eq!(len(&disk), Some(2 << 20));
    }

    #[test]
    fn who_comes_second_finds_the_room_that_was_given_back() {
        let disk = SimDisk::new();
        disk.set_capacity(Some(32 << 20));
        let mut tries = 0;
        let done = with(&disk, || {
            tries += 1;
            let source = std::io::Error::from_raw_os_error(28);
            let full = StoreError::Io { op: "write", path: "it".to_owned(), source };
            if tries == 1 { Err(full) } else { Ok(()) }
        });
        assert!(done.is_ok() && tries == 2);
    }

    #[test]
    fn it_is_given_back_once_and_set_aside_where_there_is_room() {
        let disk = SimDisk::new();
        keep(&disk);
        assert_eq!(len(&disk), None, "nobody knows how large that disk is");
        disk.set_capacity(Some(32 << 20));
        keep(&disk);
        assert_eq!(len(&disk), Some(2 << 20));
        let mut tries = 0;
        let full = with(&disk, || {
            tries += 1;
            let source = std::io::Error::from_raw_os_error(28);
            Err::<(), _>(StoreError::Io { op: "write", path: "it".to_owned(), source })
        });
        assert!(full.is_err() && tries == 2 && len(&disk).is_none());
        let ballast = disk.create("ballast").expect("a file");
        ballast.write_all_at(0, &vec![1; 29 << 20]).expect("a write");
        keep(&disk);
        assert_eq!(len(&disk), None, "it would take what little there is");
        disk.remove("ballast").expect("it goes");
        keep(&disk);
        assert_eq!(len(&disk), Some(2 << 20));
    }
}
