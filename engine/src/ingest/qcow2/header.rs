//! The header of a qcow2 file.
//!
//! ```text
//!   0 magic  4 version u32          36 upper table entries u32
//!   8 backing name offset u64       40 upper table offset u64
//!  16 backing name length u32       72 incompatible features u64 (version 3)
//!  20 cluster bits u32             100 header length u32         (version 3)
//!  24 disk length u64              104 compression u8            (version 3)
//!  32 encryption u32
//! ```
//!
//! All integers are big-endian.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::MAGIC;
use crate::error::{Qcow2Error, StoreError};
use crate::units::{IMAGE_LEN_MAX, to_u64, to_usize};

const HEADER_LEN: usize = 112;
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const L1_ENTRIES_MAX: u64 = 4 << 20;
const BACKING_NAME_LEN_MAX: u32 = 1023;
/// The extension that tells the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Extensions are looked for up to here; the name lies behind them.
const EXTENSIONS_END_MAX: u64 = 64 << 10;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Deflate,
    Zstd,
}

/// What the reader needs of a header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Length of the disk in bytes.
    pub(super) len: u64,
    pub(super) l1_offset: u64,
    /// Entries of the upper table that the disk needs.
    pub(super) l1_entries: u64,
    pub(super) compression: Compression,
}

impl Header {
    pub(super) fn cluster_len(&self) -> u64 {
        1 << self.cluster_bits
    }
}

struct Bytes([u8; HEADER_LEN]);

impl Bytes {
    fn u32(&self, at: usize) -> u32 {
        let bytes = self.0[at..].first_chunk().expect("fields lie inside the header");
        u32::from_be_bytes(*bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        let bytes = self.0[at..].first_chunk().expect("fields lie inside the header");
        u64::from_be_bytes(*bytes)
    }
}

/// What an image is written over.
#[derive(Debug)]
pub(super) struct Over {
    /// As the image calls it; for people.
    pub(super) name: String,
    /// Whether that is qcow2 itself, if the image says.
    pub(super) is_qcow2: Option<bool>,
}

/// Reads and checks the header.
pub(super) fn read(file: &File, file_len: u64) -> Result<(Header, Option<Over>), StoreError> {
    let mut bytes = [0; HEADER_LEN];
    let have = to_usize(file_len.min(to_u64(HEADER_LEN)));
    let read = file.read_exact_at(&mut bytes[..have], 0);
    read.map_err(StoreError::transfer("read input"))?;
    if have < 72 || !bytes.starts_with(&MAGIC) {
        return Err(Qcow2Error::Header("magic").into());
    }
    let bytes = Bytes(bytes);
    let version = bytes.u32(4);
    let features = match version {
        2 => 0,
        3 => bytes.u64(72),
        _ => return Err(Qcow2Error::Unsupported(format!("version {version}")).into()),
    };
    refuse(&bytes, features)?;
    let header = Header {
        version,
        cluster_bits: bytes.u32(20),
        len: bytes.u64(24),
        l1_offset: bytes.u64(40),
        l1_entries: 0,
        compression: compression(&bytes, features)?,
    };
    let header = bounded(header, u64::from(bytes.u32(36)), file_len)?;
    if bytes.u64(8) == 0 {
        return Ok((header, None));
    }
    let extensions = if version == 2 { 72 } else { bytes.u32(100) };
    let end = header.cluster_len().min(file_len).min(EXTENSIONS_END_MAX);
    let is_qcow2 = backing_is_qcow2(file, u64::from(extensions)..end)?;
    Ok((header, Some(Over { name: backing_name(file, &bytes), is_qcow2 })))
}

/// Looks for the format of the backing file among the header's extensions:
/// type u32, length u32, bytes padded to eight; the last has type 0.
fn backing_is_qcow2(file: &File, place: Range<u64>) -> Result<Option<bool>, StoreError> {
    let bytes = match place.end.checked_sub(place.start) {
        Some(len) => super::read(file, place.start, to_usize(len))?,
        None => return Ok(None),
    };
    let mut rest = &bytes[..];
    while let Some((head, tail)) = rest.split_first_chunk::<8>() {
        let [kind, len] = [&head[..4], &head[4..]].map(|field| {
            u32::from_be_bytes(*field.first_chunk().expect("half of eight bytes is four"))
        });
        let len = to_usize(u64::from(len));
        match (kind, tail.get(..len)) {
            (0, _) | (_, None) => break,
            (BACKING_FORMAT, Some(b"qcow2")) => return Ok(Some(true)),
            (BACKING_FORMAT, Some(b"raw")) => return Ok(Some(false)),
            (BACKING_FORMAT, Some(other)) => {
                let name = String::from_utf8_lossy(other);
                let name: String = name.chars().filter(|c| !c.is_control()).take(32).collect();
                return Err(
                    Qcow2Error::Unsupported(format!("a backing file of format `{name}`")).into()
                );
            }
            (_, Some(_)) => rest = tail.get(len.next_multiple_of(8)..).unwrap_or_default(),
        }
    }
    Ok(None)
}

/// Refuses what needs a data file or keys, and what is not known, by name.
fn refuse(bytes: &Bytes, features: u64) -> Result<(), StoreError> {
    let unknown = features & !(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2);
    let what = if bytes.u32(32) != 0 {
        "encryption".to_owned()
    } else if features & CORRUPT != 0 {
        "an image that is marked as corrupt".to_owned()
    } else if features & EXTERNAL_DATA != 0 {
        "an external data file".to_owned()
    } else if features & EXTENDED_L2 != 0 {
        "subclusters".to_owned()
    } else if unknown != 0 {
        format!("feature bit {}", unknown.trailing_zeros())
    } else {
        return Ok(());
    };
    Err(Qcow2Error::Unsupported(what).into())
}

fn backing_name(file: &File, bytes: &Bytes) -> String {
    let len = bytes.u32(16).min(BACKING_NAME_LEN_MAX);
    let mut name = vec![0; to_usize(u64::from(len))];
    match file.read_exact_at(&mut name, bytes.u64(8)) {
        Ok(()) => String::from_utf8_lossy(&name).chars().filter(|c| !c.is_control()).collect(),
        Err(_) => "(its name cannot be read)".to_owned(),
    }
}

fn compression(bytes: &Bytes, features: u64) -> Result<Compression, StoreError> {
    if features & COMPRESSION == 0 {
        return Ok(Compression::Deflate);
    }
    match bytes.0[104] {
        0 => Ok(Compression::Deflate),
        1 => Ok(Compression::Zstd),
        other => Err(Qcow2Error::Unsupported(format!("compression {other}")).into()),
    }
}

fn bounded(header: Header, l1_entries: u64, file_len: u64) -> Result<Header, StoreError> {
    if !CLUSTER_BITS.contains(&header.cluster_bits) {
        return Err(Qcow2Error::Header("cluster size").into());
    }
    if header.len > IMAGE_LEN_MAX {
        return Err(StoreError::ImageTooLong(header.len));
    }
    let covered = header.cluster_len() * (header.cluster_len() / 8);
    let needed = header.len.div_ceil(covered);
    if needed > l1_entries || needed > L1_ENTRIES_MAX {
        return Err(Qcow2Error::Header("upper table").into());
    }
    let end = header.l1_offset.checked_add(needed * 8);
    if end.is_none_or(|end| end > file_len) {
        let offset = header.l1_offset;
        return Err(Qcow2Error::Outside { what: "the upper table", offset }.into());
    }
    Ok(Header { l1_entries: needed, ..header })
}
