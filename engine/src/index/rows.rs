//! Rows of the ledger: what a collection knows of the store, kept beside the
//! index, derived like it, and gone with it.
//!
//! The index itself only writes rows that say from where an object moved and
//! which packs have copies, and removes the rows of a pack with the pack. All
//! others are the ledger's own.

use super::Place;
use crate::id::{ObjectKey, PackId};
use crate::pack::EntryNo;

/// The key of a row; its first byte says what it is about.
pub(crate) type RowKey = Vec<u8>;

/// A row and its new value, or none to remove it.
pub(crate) type RowChange = (RowKey, Option<Vec<u8>>);

/// That the rows belong together.
pub(crate) const VALID: u8 = b'v';
/// Key of an object -> its references, unless it has just one.
pub(crate) const COUNT: u8 = b'c';
/// Pack id -> a bit for each of its objects that is needed.
pub(crate) const LIVE: u8 = b'b';
/// Pack id -> what lives in it, in bytes.
pub(crate) const PACK: u8 = b'p';
/// An image that was counted.
pub(crate) const IMAGE: u8 = b'i';
/// A snapshot that was counted.
pub(crate) const SNAPSHOT: u8 = b's';
/// Snapshot id and key of an event about it.
pub(crate) const EVENT: u8 = b'e';
/// Pack id and number of an object -> the place where it was found before.
pub(crate) const MOVED: u8 = b'm';

/// A pack, and an older one that has an object of it too.
pub(crate) const COPY: u8 = b'x';
/// That there is a row for every such pair.
pub(crate) const COPIES_TOLD: u8 = b'X';

/// The row of two packs that have an object both.
pub(crate) fn copy(younger: PackId, older: PackId) -> RowKey {
    let mut key = of_pack(COPY, younger);
    key.extend_from_slice(&older.0.to_be_bytes());
    key
}

/// The younger and the older pack in the key of such a row.
pub(crate) fn copy_of(key: &[u8]) -> Option<(PackId, PackId)> {
    let older = key.get(9..17)?.first_chunk().map(|id| PackId(u64::from_be_bytes(*id)))?;
    Some((pack_of(key)?, older))
}

/// Pack id -> a bit for each of its objects that is needed and found in a
/// younger pack.
pub(crate) const TWICE: u8 = b't';
/// Key of an object -> where else it lies, in older packs.
pub(crate) const OLDER: u8 = b'o';
/// Root of an image whose frames were looked at.
pub(crate) const LOOKED: u8 = b'f';

/// The row of a pack.
pub(crate) fn of_pack(tag: u8, pack: PackId) -> RowKey {
    let mut key = vec![tag];
    key.extend_from_slice(&pack.0.to_be_bytes());
    key
}

/// The row of an object.
pub(crate) fn of_object(tag: u8, key: ObjectKey) -> RowKey {
    let mut row = vec![tag];
    row.extend_from_slice(&key.0);
    row
}

/// The row that says from where the object at this place moved.
pub(crate) fn moved(place: Place) -> RowKey {
    let mut key = of_pack(MOVED, place.pack);
    key.extend_from_slice(&place.entry.0.to_be_bytes());
    key
}

/// The pack in the key of a row of a pack, or of a moved object.
pub(crate) fn pack_of(key: &[u8]) -> Option<PackId> {
    key.get(1..9)?.first_chunk().map(|id| PackId(u64::from_be_bytes(*id)))
}

/// The place in the key of a row of a moved object.
pub(crate) fn place_of(key: &[u8]) -> Option<Place> {
    let entry = key.get(9..13)?.first_chunk().map(|at| EntryNo(u32::from_be_bytes(*at)))?;
    Some(Place { pack: pack_of(key)?, entry })
}

/// A place as the value of a row.
pub(crate) fn place_from(value: &[u8]) -> Option<Place> {
    value.first_chunk().map(|bits| Place::from_bits(u64::from_le_bytes(*bits)))
}
