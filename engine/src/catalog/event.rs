//! Events: what happened to the catalog.
//!
//! ```text
//! version u16 | kind u8 | zero u8 | time, unix ms u64 | snapshot id, 32
//! name length u32 | name | new bytes u64 | labels u32
//! for each label, ascending by key: key length u32 | key | value length u32 | value
//! ```

use std::collections::BTreeMap;

use super::Entry;
use crate::error::{FormatError, StoreError};
use crate::id::{Name, SnapshotId};
use crate::pack::fields::{Fields, bound, put_bytes};
use crate::units::to_u32;

const VERSION: u16 = 1;
const LABELS_MAX: usize = 64;
const LABEL_KEY_LEN_MAX: usize = 200;
const LABEL_VALUE_LEN_MAX: usize = 4096;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventKind {
    /// A snapshot was committed, perhaps with a name.
    Commit,
    /// A snapshot got another name.
    Tag,
    /// A name was taken away.
    Untag,
    /// A snapshot without names was removed.
    Drop,
}

/// An entry of the catalog's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) kind: EventKind,
    pub(crate) time_unix_ms: u64,
    pub(crate) snapshot: SnapshotId,
    pub(crate) name: Option<Name>,
    /// Plaintext bytes that a commit stored for the first time.
    pub(crate) new_bytes: u64,
    pub(crate) labels: BTreeMap<String, String>,
}

impl EventKind {
    fn code(self) -> u8 {
        match self {
            Self::Commit => 1,
            Self::Tag => 2,
            Self::Untag => 3,
            Self::Drop => 4,
        }
    }

    fn from_code(code: u8) -> Result<Self, FormatError> {
        match code {
            1 => Ok(Self::Commit),
            2 => Ok(Self::Tag),
            3 => Ok(Self::Untag),
            4 => Ok(Self::Drop),
            _ => Err(FormatError::Field("event kind")),
        }
    }
}

impl Event {
    /// A drop of a snapshot that cannot exist: it changes nothing, and its
    /// entry in the root log carries the highest pack id.
    pub(crate) fn nothing(time_unix_ms: u64) -> Self {
        Self {
            kind: EventKind::Drop,
            time_unix_ms,
            snapshot: SnapshotId::from_bytes([0; 32]),
            name: None,
            new_bytes: 0,
            labels: BTreeMap::new(),
        }
    }

    /// Takes a name from a snapshot, or removes one that has none.
    pub(crate) fn removal(
        entry: &Entry,
        name_or_id: &str,
        time_unix_ms: u64,
    ) -> Result<Self, StoreError> {
        let name = entry.names.iter().find(|name| name.as_str() == name_or_id).cloned();
        let kind = match &name {
            Some(_) => EventKind::Untag,
            None if entry.names.is_empty() => EventKind::Drop,
            None => return Err(StoreError::Invalid("the snapshot has names; remove it by name")),
        };
        Ok(Self { kind, snapshot: entry.id, name, ..Self::nothing(time_unix_ms) })
    }

    /// Refuses what cannot be encoded.
    pub(crate) fn check(&self) -> Result<(), FormatError> {
        bound("labels", self.labels.len() as u64, LABELS_MAX as u64)?;
        for (key, value) in &self.labels {
            bound("label key length", key.len() as u64, LABEL_KEY_LEN_MAX as u64)?;
            bound("label value length", value.len() as u64, LABEL_VALUE_LEN_MAX as u64)?;
        }
        Ok(())
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = VERSION.to_le_bytes().to_vec();
        out.extend_from_slice(&[self.kind.code(), 0]);
        out.extend_from_slice(&self.time_unix_ms.to_le_bytes());
        out.extend_from_slice(self.snapshot.as_bytes());
        put_bytes(&mut out, self.name.as_ref().map_or("", Name::as_str).as_bytes());
        out.extend_from_slice(&self.new_bytes.to_le_bytes());
        out.extend_from_slice(&to_u32(self.labels.len()).to_le_bytes());
        for (key, value) in &self.labels {
            put_bytes(&mut out, key.as_bytes());
            put_bytes(&mut out, value.as_bytes());
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        match fields.u16()? {
            VERSION => {}
            version => return Err(FormatError::Version(u32::from(version))),
        }
        let kind = EventKind::from_code(fields.u8()?)?;
        fields.zeros(1, "event header")?;
        let time_unix_ms = fields.u64()?;
        let snapshot = SnapshotId::from_bytes(fields.array()?);
        let name = match text(&mut fields, "name length", Name::LEN_MAX)? {
            "" => None,
            name => Some(name.parse().map_err(|_| FormatError::Field("name"))?),
        };
        let new_bytes = fields.u64()?;
        let count = fields.u32()?;
        bound("labels", u64::from(count), LABELS_MAX as u64)?;
        let mut labels = BTreeMap::new();
        for _ in 0..count {
            let key = text(&mut fields, "label key length", LABEL_KEY_LEN_MAX)?.to_owned();
            let value = text(&mut fields, "label value length", LABEL_VALUE_LEN_MAX)?.to_owned();
            labels.insert(key, value);
        }
        fields.end()?;
        Ok(Self { kind, time_unix_ms, snapshot, name, new_bytes, labels })
    }
}

fn text<'a>(
    fields: &mut Fields<'a>,
    what: &'static str,
    limit: usize,
) -> Result<&'a str, FormatError> {
    std::str::from_utf8(fields.bytes(what, limit)?).map_err(|_| FormatError::Field("text"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Event {
        Event {
            kind: EventKind::Commit,
            time_unix_ms: 1_000,
            snapshot: SnapshotId::of(b"s"),
            name: "debian:12".parse().ok(),
            new_bytes: 4096,
            labels: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
        }
    }

    #[test]
    fn events_survive() {
        let event = sample();
        let bytes = event.encode();
        assert_eq!(Event::decode(&bytes), Ok(event));
        for len in 0..bytes.len() {
            assert!(Event::decode(&bytes[..len]).is_err(), "length {len}");
        }
    }
}
