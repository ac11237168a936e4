//! The root log: every event in order, each entry with a checksum.
//!
//! ```text
//! header 16:  magic "CPROOTS1" | version u32 | zero u32
//! entry:      magic "CPRL" | body length u32 | sequence u64 | highest pack id u64
//!             stored bytes u64 | checksum, 16 | body
//! body:       event length u32 | event | record length u32 | record
//! ```
//!
//! The checksum covers the entry's other fields and its body. An entry in which
//! one bit is wrong is mended: the checksum says which. Another entry that is
//! not whole was never acknowledged if it is the last, and is cut off; one that
//! is followed by a whole entry is damage, and opening fails.

use super::{Event, LoggedEvent, SnapshotRecord};
use crate::error::{FormatError, StoreError};
use crate::id::PackId;
use crate::io::{Access, Disk, DiskFile};
use crate::pack::fields::{Fields, bound, checksum, put_bytes};
use crate::units::{FORMAT_VERSION, RECORD_LEN_MAX, to_u32, to_u64, to_usize};

/// The log's file in a store.
pub(crate) const PATH: &str = "roots.log";

const NEW_PATH: &str = "roots.new";
const MAGIC: [u8; 8] = *b"CPROOTS1";
const HEADER_LEN: usize = 16;
const ENTRY_MAGIC: [u8; 4] = *b"CPRL";
const ENTRY_HEADER_LEN: usize = 48;
const CHECKED_LEN: usize = 32;
const BODY_LEN_MAX: usize = 1 << 20;
/// No entry is longer.
const ENTRY_LEN_MAX: usize = ENTRY_HEADER_LEN + BODY_LEN_MAX;
/// Bytes of the log in memory.
const PART_LEN: usize = 4 * ENTRY_LEN_MAX;
const CONTEXT: &str = "coppice 2026-11 root log checksum v1";
/// Entries up to this length are mended; longer ones take too many attempts.
const MENDED_LEN_MAX: usize = 4096;

/// An open log, which ends with a whole entry.
#[derive(Debug)]
pub(crate) struct RootLog {
    file: Box<dyn DiskFile>,
    end: u64,
    next_sequence: u64,
}

/// What went wrong when appending, and whether the log may now end in
/// something unknown.
#[derive(Debug)]
pub(crate) struct AppendError {
    pub(crate) error: StoreError,
    pub(crate) must_fence: bool,
}

impl RootLog {
    /// Opens the log and replays it. `None` if there is none.
    pub(crate) fn open(
        disk: &dyn Disk,
        replay: &mut dyn FnMut(LoggedEvent),
    ) -> Result<Option<Self>, StoreError> {
        let listed = disk.list("").map_err(StoreError::io("list", "the store"))?;
        let Some(len) = listed.iter().find(|file| file.name == PATH).map(|file| file.len) else {
            return Ok(None);
        };
        let file = disk.open(PATH, Access::Write).map_err(StoreError::io("open", PATH))?;
        let (end, next_sequence) =
            replay_all(&*file, len, replay, &|at, entry| rewrite(&*file, at, entry))?;
        let log = Self { file, end, next_sequence };
        log.cut_tail(len)?;
        Ok(Some(log))
    }

    /// Replays a log that stays as it is; returns its length.
    pub(crate) fn look(
        disk: &dyn Disk,
        replay: &mut dyn FnMut(LoggedEvent),
    ) -> Result<Option<u64>, StoreError> {
        let file = match disk.open(PATH, Access::Read) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(StoreError::io("open", PATH))?,
        };
        let len = file.length().map_err(StoreError::io("read", PATH))?;
        replay_all(&*file, len, replay, &|_, _| Ok(()))?;
        Ok(Some(len))
    }

    fn cut_tail(&self, len: u64) -> Result<(), StoreError> {
        if len > self.end {
            tracing::warn!(
                bytes = len - self.end,
                "an unfinished entry of the root log is cut off"
            );
            self.file.truncate(self.end).map_err(StoreError::io("cut", PATH))?;
            self.file.sync().map_err(StoreError::io("flush", PATH))?;
        }
        Ok(())
    }

    /// Writes a log with the given history, whole or not at all.
    pub(crate) fn create(disk: &dyn Disk, events: &[LoggedEvent]) -> Result<Self, StoreError> {
        if disk
            .list("")
            .map_err(StoreError::io("list", "the store"))?
            .iter()
            .any(|f| f.name == NEW_PATH)
        {
            disk.remove(NEW_PATH).map_err(StoreError::io("remove", NEW_PATH))?;
        }
        let mut bytes = header().to_vec();
        for (event, sequence) in events.iter().zip(1..) {
            bytes.extend_from_slice(&encode_entry(event, sequence));
        }
        let file = disk.create(NEW_PATH).map_err(StoreError::io("create", NEW_PATH))?;
        file.write_all_at(0, &bytes).map_err(StoreError::io("write", NEW_PATH))?;
        file.sync().map_err(StoreError::io("flush", NEW_PATH))?;
        disk.rename(NEW_PATH, PATH).map_err(StoreError::io("rename to", PATH))?;
        disk.sync_dir("").map_err(StoreError::io("flush", "the store"))?;
        let next_sequence = to_u64(events.len()) + 1;
        Ok(Self { file, end: to_u64(bytes.len()), next_sequence })
    }

    /// Appends an entry and makes it durable.
    pub(crate) fn append(&mut self, logged: &LoggedEvent) -> Result<(), AppendError> {
        let bytes = encode_entry(logged, self.next_sequence);
        if let Err(error) = self.file.write_all_at(self.end, &bytes) {
            // Whatever part was written goes away again, or nothing more may
            // be written behind it.
            let must_fence = self.file.truncate(self.end).is_err();
            return Err(AppendError { error: StoreError::io("write", PATH)(error), must_fence });
        }
        if let Err(error) = self.file.sync() {
            let error = StoreError::io("flush", PATH)(error);
            return Err(AppendError { error, must_fence: true });
        }
        self.end += to_u64(bytes.len());
        self.next_sequence += 1;
        Ok(())
    }

    /// Bytes of the log.
    pub(crate) fn len(&self) -> u64 {
        self.end
    }
}

/// A log that is read in parts: however long the file says that it is, a few
/// entries are in memory.
struct Parts<'f> {
    file: &'f dyn DiskFile,
    len: u64,
    start: u64,
    bytes: Vec<u8>,
}

impl<'f> Parts<'f> {
    fn of(file: &'f dyn DiskFile, len: u64) -> Self {
        Self { file, len, start: 0, bytes: Vec::new() }
    }

    /// What begins at an offset: as much as the longest entry has, or all up to
    /// the end of the file.
    fn at(&mut self, offset: u64) -> Result<&[u8], StoreError> {
        let end = self.start + to_u64(self.bytes.len());
        let enough = end == self.len || offset + to_u64(ENTRY_LEN_MAX) <= end;
        if offset < self.start || offset > end || !enough {
            let len = to_usize((self.len - offset).min(to_u64(PART_LEN)));
            self.bytes = self.file.read_at(offset, len).map_err(StoreError::io("read", PATH))?;
            self.start = offset;
        }
        Ok(&self.bytes[to_usize(offset - self.start)..])
    }

    /// Whether a whole entry begins anywhere behind an offset.
    fn has_entry_behind(&mut self, offset: u64) -> Result<bool, StoreError> {
        let mut at = offset + 1;
        while at < self.len {
            let len = self.len;
            let bytes = self.at(at)?;
            let is_last = at + to_u64(bytes.len()) == len;
            // An entry that begins later may not be here to its end.
            let begins = if is_last { bytes.len() } else { bytes.len() - ENTRY_LEN_MAX + 1 };
            let whole = |at: usize| {
                bytes[at..].starts_with(&ENTRY_MAGIC) && decode_entry(&bytes[at..], None).is_ok()
            };
            if (0..begins).any(whole) {
                return Ok(true);
            }
            at += to_u64(begins);
        }
        Ok(false)
    }
}

/// Puts an entry at an offset of the log.
type Mend<'m> = dyn Fn(u64, &[u8]) -> Result<(), StoreError> + 'm;

/// Replays all entries, and has those mended in which one bit is wrong. Returns
/// where they end, and the sequence number of the next.
fn replay_all(
    file: &dyn DiskFile,
    len: u64,
    replay: &mut dyn FnMut(LoggedEvent),
    mend: &Mend<'_>,
) -> Result<(u64, u64), StoreError> {
    let damaged = |offset, source| StoreError::RootLog { offset, source };
    let mut parts = Parts::of(file, len);
    check_header(parts.at(0)?).map_err(|source| damaged(0, source))?;
    let mut at = to_u64(HEADER_LEN);
    let mut next_sequence = 1;
    while at < len {
        let bytes = parts.at(at)?;
        let (logged, entry_len) = match decode_entry(bytes, Some(next_sequence)) {
            Ok(whole) => whole,
            Err(source) => {
                let Some((logged, entry)) = mended(bytes, next_sequence) else {
                    if parts.has_entry_behind(at)? {
                        return Err(damaged(at, source));
                    }
                    break;
                };
                mend(at, &entry)?;
                (logged, entry.len())
            }
        };
        replay(logged);
        at += to_u64(entry_len);
        next_sequence += 1;
    }
    Ok((at, next_sequence))
}

/// The entry at the front with one bit turned, if that makes it whole. A torn
/// entry lacks more than a bit, so none is invented.
fn mended(bytes: &[u8], sequence: u64) -> Option<(LoggedEvent, Vec<u8>)> {
    let mut bytes = bytes[..bytes.len().min(MENDED_LEN_MAX)].to_vec();
    let body_len = bytes.get(4..8)?.first_chunk().map(|len| u32::from_le_bytes(*len))?;
    // With a wrong length only a bit of the header can be the wrong one.
    let whole_len = ENTRY_HEADER_LEN.saturating_add(to_usize(u64::from(body_len)));
    let looked_at = if whole_len <= bytes.len() { whole_len } else { ENTRY_HEADER_LEN };
    for bit in 0..looked_at.min(bytes.len()) * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok((logged, len)) = decode_entry(&bytes, Some(sequence)) {
            bytes.truncate(len);
            return Some((logged, bytes));
        }
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    None
}

fn rewrite(file: &dyn DiskFile, at: u64, entry: &[u8]) -> Result<(), StoreError> {
    tracing::warn!(offset = at, "a bit of the root log was wrong; it is mended");
    file.write_all_at(at, entry).map_err(StoreError::io("mend", PATH))?;
    file.sync().map_err(StoreError::io("flush", PATH))
}

fn header() -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    header
}

fn check_header(bytes: &[u8]) -> Result<(), FormatError> {
    match bytes.first_chunk::<HEADER_LEN>() {
        None => Err(FormatError::Short),
        Some(found) if *found == header() => Ok(()),
        Some(_) => Err(FormatError::Magic),
    }
}

fn encode_entry(logged: &LoggedEvent, sequence: u64) -> Vec<u8> {
    let mut body = Vec::new();
    put_bytes(&mut body, &logged.event.encode());
    put_bytes(&mut body, &logged.record.as_ref().map_or(Vec::new(), SnapshotRecord::encode));
    let mut out = ENTRY_MAGIC.to_vec();
    out.extend_from_slice(&to_u32(body.len()).to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&logged.pack.0.to_le_bytes());
    out.extend_from_slice(&logged.stored_bytes.to_le_bytes());
    let sum = checksum(CONTEXT, &[&out, &body]);
    out.extend_from_slice(&sum);
    out.extend_from_slice(&body);
    out
}

/// The entry at the front and its length. `sequence` is what it must have.
fn decode_entry(bytes: &[u8], sequence: Option<u64>) -> Result<(LoggedEvent, usize), FormatError> {
    let mut fields = Fields::new(bytes);
    if fields.array()? != ENTRY_MAGIC {
        return Err(FormatError::Magic);
    }
    let body_len = fields.u32()?;
    bound("root log entry", u64::from(body_len), to_u64(BODY_LEN_MAX))?;
    let found_sequence = fields.u64()?;
    let pack = PackId(fields.u64()?);
    let stored_bytes = fields.u64()?;
    let sum: [u8; 16] = fields.array()?;
    let body = fields.take(to_usize(u64::from(body_len)))?;
    if checksum(CONTEXT, &[&bytes[..CHECKED_LEN], body]) != sum {
        return Err(FormatError::Checksum);
    }
    if sequence.is_some_and(|sequence| sequence != found_sequence) {
        return Err(FormatError::Field("root log sequence"));
    }
    bound("pack id", pack.0, PackId::LIMIT)?;
    let mut fields = Fields::new(body);
    let event = Event::decode(fields.bytes("event", BODY_LEN_MAX)?)?;
    let record = match fields.bytes("record", RECORD_LEN_MAX)? {
        [] => None,
        record => Some(SnapshotRecord::decode(record)?),
    };
    fields.end()?;
    let logged = LoggedEvent { event, record, pack, stored_bytes };
    Ok((logged, ENTRY_HEADER_LEN + body.len()))
}

/// An entry of any sequence number, for tests of the decoder.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn decode_any(bytes: &[u8]) -> Result<LoggedEvent, FormatError> {
    decode_entry(bytes, None).map(|(logged, _)| logged)
}

/// A whole log, which nobody mends, for tests of the decoder.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn decode_whole(bytes: &[u8]) -> Result<u64, StoreError> {
    let disk = crate::io::SimDisk::new();
    let file = disk.create(PATH).map_err(StoreError::io("create", PATH))?;
    file.write_all_at(0, bytes).map_err(StoreError::io("write", PATH))?;
    replay_all(&*file, to_u64(bytes.len()), &mut |_| {}, &|_, _| Ok(())).map(|(end, _)| end)
}
