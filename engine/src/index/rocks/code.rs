//! Keys and values of the index in RocksDB.

use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::index::{PackSummary, Place};
use crate::pack::fields::Fields;
use crate::units::{PAGE_LEN, to_u64};

pub(super) fn decode_place(bytes: &[u8]) -> Result<Place, StoreError> {
    let bits = <[u8; 8]>::try_from(bytes);
    let bits = bits.map_err(|_| StoreError::Index("an entry has a wrong length".to_owned()))?;
    Ok(Place::from_bits(u64::from_le_bytes(bits)))
}

pub(super) fn decode_key(bytes: &[u8]) -> Result<ObjectKey, StoreError> {
    let key = <[u8; ObjectKey::LEN]>::try_from(bytes);
    key.map(ObjectKey).map_err(|_| StoreError::Index("a key has a wrong length".to_owned()))
}

pub(super) fn encode_summary(summary: &PackSummary) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&summary.file_len.to_le_bytes());
    bytes[8..12].copy_from_slice(&summary.entries.to_le_bytes());
    bytes[12..16].copy_from_slice(&summary.chunks.to_le_bytes());
    bytes[16..].copy_from_slice(&summary.chunk_bytes.to_le_bytes());
    bytes
}

pub(super) fn decode_pack(key: &[u8], value: &[u8]) -> Result<(PackId, PackSummary), StoreError> {
    let mut fields = Fields::new(value);
    let mut read = || {
        let pack = PackId(u64::from_be_bytes(Fields::new(key).array()?));
        let (file_len, entries, chunks) = (fields.u64()?, fields.u32()?, fields.u32()?);
        // Before there were streams, all chunks were pages and 16 bytes said it.
        let chunk_bytes = match fields.is_empty() {
            true => u64::from(chunks) * to_u64(PAGE_LEN),
            false => fields.u64()?,
        };
        Ok((pack, PackSummary { file_len, entries, chunks, chunk_bytes }))
    };
    read().map_err(|error: crate::error::FormatError| StoreError::Index(error.to_string()))
}
