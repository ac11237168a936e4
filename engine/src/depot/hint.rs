//! Hints: where an object lies, and for a leaf where its chunks lie. They are
//! derived, kept in a table of the index, and never trusted: what they name
//! is verified when it is read.
//!
//! A record belongs to a node or a root, by its key:
//!
//! ```text
//! version u8 (1) | flags u8 | own: spot | base key, 20 | runs | checksum, 8
//! spot: frame | slot            run: skipped | count | frame | slot
//! frame: 0                      the one before
//!        1 | len | objects      the one right behind the one before
//!        2 | offset | len | objects          another of the same pack
//!        3 | pack | offset | len | objects   of another pack
//! ```
//!
//! Numbers without a width are LEB128. Flag 1 says that there is a spot of the
//! object's own, flag 2 that there is a base: the record of that leaf holds
//! for all chunks that no run covers. A run stands for children in ascending
//! order that lie in neighbouring slots of one frame, after so many that are
//! skipped. The checksum covers the key, too.

use super::Location;
use crate::error::FormatError;
use crate::id::{ObjectKey, PackId};
use crate::pack::fields::{Fields, bound, checksum};
use crate::pack::frame::HEADER_LEN;
use crate::pack::{EntryNo, FrameKind, FrameSpan};
use crate::tree::FANOUT;
use crate::units::{FRAME_PLAIN_LEN_MAX, PACK_ENTRIES_MAX, PACK_LEN_MAX, to_u64, to_usize};

const VERSION: u8 = 1;
const HAS_OWN: u8 = 1;
const HAS_BASE: u8 = 2;
const SUM_LEN: usize = 8;
const CONTEXT: &str = "coppice 2026-11 hint checksum v1";

/// Where an object's bytes are, as far as a reader needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(crate) pack: PackId,
    /// Of the frame, from the start of the pack.
    pub(crate) offset: u64,
    /// Bytes of the frame's header and stored bytes.
    pub(crate) len: u32,
    /// Objects in the frame.
    pub(crate) count: u32,
    /// Its number among them.
    pub(crate) slot: u32,
}

/// What a record says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hint {
    /// Where the object itself lies.
    pub(crate) own: Option<Spot>,
    /// The leaf whose record holds for all chunks that are not below.
    pub(crate) base: Option<ObjectKey>,
    /// Where chunks lie, by ascending child.
    pub(crate) chunks: Vec<(u8, Spot)>,
}

impl From<Location> for Spot {
    fn from(at: Location) -> Self {
        let FrameSpan { offset, len, count, .. } = at.span;
        Self { pack: at.pack, offset, len, count, slot: at.slot }
    }
}

impl Spot {
    /// The frame, if it is one of objects.
    pub(super) fn objects(&self) -> FrameSpan {
        let Self { offset, len, count, .. } = *self;
        FrameSpan { offset, len, first: EntryNo(0), count, kind: FrameKind::Objects }
    }

    /// The first byte behind the frame.
    pub(super) fn end(&self) -> u64 {
        self.offset + u64::from(self.len)
    }

    fn is_in_frame_of(&self, other: &Self) -> bool {
        Self { slot: other.slot, ..*self } == *other
    }
}

impl Hint {
    /// The record of the object with this key.
    pub(crate) fn encode(&self, key: &ObjectKey) -> Vec<u8> {
        let flag = |is_set: bool, flag| if is_set { flag } else { 0 };
        let flags = flag(self.own.is_some(), HAS_OWN) | flag(self.base.is_some(), HAS_BASE);
        let mut writer = Writer { out: vec![VERSION, flags], last: None };
        if let Some(own) = &self.own {
            writer.spot(own);
        }
        if let Some(base) = &self.base {
            writer.out.extend_from_slice(&base.0);
        }
        let mut next = 0;
        for run in self.chunks.chunk_by(are_neighbours) {
            let Some((first, spot)) = run.first() else { continue };
            let count = to_u64(run.len());
            writer.number(u64::from(*first) - next);
            writer.number(count);
            writer.spot(spot);
            next = u64::from(*first) + count;
        }
        let sum = sum_of(key, &writer.out);
        writer.out.extend_from_slice(&sum);
        writer.out
    }

    /// Reads the record of the object with this key.
    pub(crate) fn decode(key: &ObjectKey, bytes: &[u8]) -> Result<Self, FormatError> {
        let (body, sum) = bytes.split_last_chunk::<SUM_LEN>().ok_or(FormatError::Short)?;
        if sum_of(key, body) != *sum {
            return Err(FormatError::Checksum);
        }
        let mut reader = Reader { fields: Fields::new(body), last: None };
        match reader.fields.u8()? {
            VERSION => {}
            version => return Err(FormatError::Version(version.into())),
        }
        let flags = reader.fields.u8()?;
        bound("hint flags", flags.into(), u64::from(HAS_OWN | HAS_BASE))?;
        let own = if flags & HAS_OWN == 0 { None } else { Some(reader.spot()?) };
        let base =
            if flags & HAS_BASE == 0 { None } else { Some(ObjectKey(reader.fields.array()?)) };
        let mut hint = Self { own, base, chunks: Vec::new() };
        let mut next = 0;
        while !reader.fields.is_empty() {
            next = reader.run(next, &mut hint.chunks)?;
        }
        Ok(hint)
    }
}

fn sum_of(key: &ObjectKey, body: &[u8]) -> [u8; SUM_LEN] {
    let sum = checksum(CONTEXT, &[&key.0, body]);
    *sum.first_chunk().expect("a checksum is longer")
}

fn are_neighbours((child, spot): &(u8, Spot), (next, other): &(u8, Spot)) -> bool {
    spot.is_in_frame_of(other) && other.slot == spot.slot + 1 && child.checked_add(1) == Some(*next)
}

struct Writer {
    out: Vec<u8>,
    last: Option<Spot>,
}

impl Writer {
    fn number(&mut self, mut value: u64) {
        while let Ok(low) = u8::try_from(value & 0x7f)
            && value > 0x7f
        {
            self.out.push(low | 0x80);
            value >>= 7;
        }
        self.out.extend(u8::try_from(value));
    }

    fn spot(&mut self, spot: &Spot) {
        let place = [spot.pack.0, spot.offset];
        match self.last.replace(*spot) {
            Some(last) if spot.is_in_frame_of(&last) => {
                self.out.push(0);
                return self.number(spot.slot.into());
            }
            Some(last) if last.pack == spot.pack && last.end() == spot.offset => self.out.push(1),
            Some(last) if last.pack == spot.pack => {
                self.out.push(2);
                self.number(spot.offset);
            }
            _ => {
                self.out.push(3);
                place.iter().for_each(|number| self.number(*number));
            }
        }
        [spot.len, spot.count, spot.slot].iter().for_each(|it| self.number(u64::from(*it)));
    }
}

struct Reader<'a> {
    fields: Fields<'a>,
    last: Option<Spot>,
}

impl Reader<'_> {
    fn number(&mut self, what: &'static str, limit: u64) -> Result<u64, FormatError> {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = u64::from(self.fields.u8()?);
            value |= (byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                bound(what, value, limit)?;
                return Ok(value);
            }
            bound("hint number", shift, 56)?;
        }
    }

    fn small(&mut self, what: &'static str, limit: u64) -> Result<u32, FormatError> {
        let value = self.number(what, limit.min(u64::from(u32::MAX)))?;
        u32::try_from(value).map_err(|_| FormatError::Field(what))
    }

    fn spot(&mut self) -> Result<Spot, FormatError> {
        let how = self.fields.u8()?;
        let last = self.last;
        let before = || last.ok_or(FormatError::Field("hint frame"));
        let mut spot = match how {
            0 => before()?,
            1 => Spot { offset: before()?.end(), ..before()? },
            2 => Spot { offset: self.number("frame offset", PACK_LEN_MAX)?, ..before()? },
            3 => {
                let pack = PackId(self.number("pack id", PackId::LIMIT - 1)?);
                let offset = self.number("frame offset", PACK_LEN_MAX)?;
                Spot { pack, offset, len: 0, count: 0, slot: 0 }
            }
            _ => return Err(FormatError::Field("hint frame")),
        };
        bound("frame offset", spot.offset, PACK_LEN_MAX)?;
        if how != 0 {
            spot.len = self.small("frame length", to_u64(HEADER_LEN + FRAME_PLAIN_LEN_MAX))?;
            spot.count = self.small("frame objects", u64::from(PACK_ENTRIES_MAX))?;
            if to_usize(u64::from(spot.len)) < HEADER_LEN {
                return Err(FormatError::Field("frame length"));
            }
        }
        let limit = spot.count.checked_sub(1).ok_or(FormatError::Field("frame objects"))?;
        spot.slot = self.small("slot", limit.into())?;
        self.last = Some(spot);
        Ok(spot)
    }

    /// Reads a run that begins at or behind child `next`; returns the child
    /// behind it.
    fn run(&mut self, next: u64, chunks: &mut Vec<(u8, Spot)>) -> Result<u64, FormatError> {
        let end = to_u64(FANOUT);
        let first = next + self.number("hint run", end - next)?;
        let count = self.number("hint run", end - first)?;
        if count == 0 {
            return Err(FormatError::Field("hint run"));
        }
        let spot = self.spot()?;
        bound("slot", u64::from(spot.slot) + count, spot.count.into())?;
        for (child, slot) in (first..first + count).zip(spot.slot..) {
            let child = u8::try_from(child).map_err(|_| FormatError::Field("hint run"))?;
            chunks.push((child, Spot { slot, ..spot }));
            self.last = Some(spot);
        }
        Ok(first + count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::NodeId;

    fn at(pack: u64, offset: u64, slot: u32) -> Spot {
        Spot { pack: PackId(pack), offset, len: 500, count: 16, slot }
    }

    fn key() -> ObjectKey {
        NodeId::of(b"a leaf").key()
    }

    fn sample() -> Hint {
        let chunks = vec![
            (0, at(7, 16, 3)),
            (1, at(7, 16, 4)),
            (5, at(7, 516, 0)),
            (6, at(2, 1 << 39, 15)),
            (126, at(7, 16, 5)),
            (127, at(7, 4000, 5)),
        ];
        Hint { own: Some(at(9, 1000, 1)), base: Some(NodeId::of(b"base").key()), chunks }
    }

    #[test]
    fn records_survive() {
        let full = sample();
        for hint in [
            Hint::default(),
            Hint { own: None, ..full.clone() },
            Hint { base: None, ..full.clone() },
            full,
        ] {
            assert_eq!(Hint::decode(&key(), &hint.encode(&key())), Ok(hint));
        }
    }

    #[test]
    fn neighbours_take_little() {
        let place = |n: u8| (n, at(1, 16 + 500 * u64::from(n / 16), u32::from(n % 16)));
        let hint = Hint { own: None, base: None, chunks: (0..128).map(place).collect() };
        assert_eq!(hint.encode(&key()).len(), 2 + 8 * 7 + 2 + SUM_LEN);
        let hint = Hint { own: None, base: None, chunks: vec![(80, at(900, 1 << 20, 7))] };
        assert_eq!(hint.encode(&key()).len(), 2 + 12 + SUM_LEN);
    }

    #[test]
    fn every_flipped_bit_and_another_key_are_seen() {
        let bytes = sample().encode(&key());
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 4;
            assert!(Hint::decode(&key(), &bytes).is_err(), "byte {at}");
        }
        assert_eq!(Hint::decode(&NodeId::of(b"b").key(), &bytes), Err(FormatError::Checksum));
    }
}
