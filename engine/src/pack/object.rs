//! Objects inside frames that do not hold pages.
//!
//! ```text
//! kind u8 | zero, 3 | length u32 | bytes
//! ```

use super::fields::{Fields, put_bytes};
use super::frame::Frame;
use crate::error::FormatError;
use crate::units::{FRAME_PLAIN_LEN_MAX, to_u32};

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ObjectKind {
    /// A tree node in full.
    Node,
    /// A tree node as the difference from another one.
    NodePatch,
    /// The root of an image.
    Root,
    /// A snapshot record.
    Snapshot,
    /// An entry of the catalog's history.
    Event,
}

impl ObjectKind {
    fn code(self) -> u8 {
        match self {
            Self::Node => 1,
            Self::NodePatch => 2,
            Self::Root => 3,
            Self::Snapshot => 4,
            Self::Event => 5,
        }
    }

    fn from_code(code: u8) -> Result<Self, FormatError> {
        match code {
            1 => Ok(Self::Node),
            2 => Ok(Self::NodePatch),
            3 => Ok(Self::Root),
            4 => Ok(Self::Snapshot),
            5 => Ok(Self::Event),
            _ => Err(FormatError::Field("object kind")),
        }
    }
}

/// Bytes of an object before its content.
pub(crate) const OBJECT_HEADER_LEN: usize = 8;

/// An object inside a decoded frame; not verified yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Object<'a> {
    pub(crate) kind: ObjectKind,
    pub(crate) bytes: &'a [u8],
}

/// Appends an object to the plaintext of a frame.
pub(crate) fn put(plain: &mut Vec<u8>, kind: ObjectKind, bytes: &[u8]) {
    plain.extend_from_slice(&[kind.code(), 0, 0, 0]);
    put_bytes(plain, bytes);
}

/// All objects of a frame that does not hold pages.
pub(crate) fn list(frame: &Frame) -> Result<Vec<Object<'_>>, FormatError> {
    if frame.kind.holds_chunks() {
        return Err(FormatError::Field("frame kind"));
    }
    let mut fields = Fields::new(&frame.plain);
    let mut objects = Vec::new();
    while !fields.is_empty() {
        objects.push(next(&mut fields)?);
    }
    if to_u32(objects.len()) == frame.count {
        Ok(objects)
    } else {
        Err(FormatError::Field("frame objects"))
    }
}

/// Where each object of a frame begins.
pub(super) fn starts(frame: &Frame) -> Result<Box<[u32]>, FormatError> {
    let mut start = 0;
    let begin = |object: Object<'_>| {
        let begins = to_u32(start);
        start += OBJECT_HEADER_LEN + object.bytes.len();
        begins
    };
    Ok(list(frame)?.into_iter().map(begin).collect())
}

/// The object that begins at a place.
pub(super) fn at(frame: &Frame, start: usize) -> Result<Object<'_>, FormatError> {
    next(&mut Fields::new(frame.plain.get(start..).ok_or(FormatError::Short)?))
}

fn next<'a>(fields: &mut Fields<'a>) -> Result<Object<'a>, FormatError> {
    let kind = ObjectKind::from_code(fields.u8()?)?;
    fields.zeros(3, "object header")?;
    let bytes = fields.bytes("object length", FRAME_PLAIN_LEN_MAX)?;
    Ok(Object { kind, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::FrameKind;

    #[test]
    fn objects_are_found_by_their_number() {
        let mut plain = Vec::new();
        for byte in 0..9_u8 {
            put(&mut plain, ObjectKind::Node, &vec![byte; usize::from(byte) * 7]);
        }
        let frame = Frame::new(FrameKind::Objects, 9, plain.clone());
        let all = list(&frame).expect("objects");
        for (slot, object) in (0..).zip(&all) {
            assert_eq!(frame.object(slot).expect("a frame").as_ref(), Some(object));
        }
        assert_eq!(frame.object(9).expect("a frame"), None);
        assert!(Frame::new(FrameKind::Objects, 8, plain.clone()).object(0).is_err());
        plain.pop();
        assert!(Frame::new(FrameKind::Objects, 9, plain).object(0).is_err());
    }
}
