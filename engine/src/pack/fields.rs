//! Reading and writing of fixed-width little-endian fields.

use crate::error::FormatError;
use crate::units::to_u64;

/// Takes fields from the front of some bytes; never beyond their end.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `len` bytes.
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(FormatError::Short)?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(FormatError::Short)?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, FormatError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Bytes behind their length in 32 bits, which may be at most `limit`.
    pub(crate) fn bytes(
        &mut self,
        what: &'static str,
        limit: usize,
    ) -> Result<&'a [u8], FormatError> {
        let len = u64::from(self.u32()?);
        bound(what, len, to_u64(limit))?;
        self.take(crate::units::to_usize(len))
    }

    /// Bytes that must be zero.
    pub(crate) fn zeros(&mut self, len: usize, what: &'static str) -> Result<(), FormatError> {
        if self.take(len)?.iter().all(|byte| *byte == 0) {
            Ok(())
        } else {
            Err(FormatError::Field(what))
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Refuses bytes that nobody asked for.
    pub(crate) fn end(&self) -> Result<(), FormatError> {
        if self.rest.is_empty() { Ok(()) } else { Err(FormatError::Field("length")) }
    }
}

/// Refuses a number above its limit.
pub(crate) fn bound(what: &'static str, value: u64, limit: u64) -> Result<(), FormatError> {
    if value <= limit { Ok(()) } else { Err(FormatError::TooLong { what, value, limit }) }
}

/// Appends bytes behind their length in 32 bits.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&crate::units::to_u32(bytes.len()).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// The first 16 bytes of the BLAKE3 of all parts, in a context of its own.
pub(crate) fn checksum(context: &'static str, parts: &[&[u8]]) -> [u8; 16] {
    // A fuzzer cannot guess it, and would see nothing behind it.
    if cfg!(fuzzing) {
        return [0; 16];
    }
    let mut hasher = blake3::Hasher::new_derive_key(context);
    for part in parts {
        hasher.update(part);
    }
    let mut sum = [0; 16];
    hasher.finalize_xof().fill(&mut sum);
    sum
}
