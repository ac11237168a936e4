//! Names of things: content hashes, pack ids and names given by people.
//!
//! Every hash is BLAKE3 in a context of its own (`derive_key`), so bytes that
//! are both a chunk and a node still have two different ids.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use blake3::hazmat::{ContextKey, HasherExt, hash_derive_key_context};
use serde::{Deserialize, Serialize};

/// A text that is not the hexadecimal form of a 32-byte hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a hash is 64 hexadecimal digits")]
pub struct ParseHashError;

fn parse_hex(text: &str) -> Result<[u8; 32], ParseHashError> {
    let hash = blake3::Hash::from_hex(text).map_err(|_| ParseHashError)?;
    Ok(*hash.as_bytes())
}

macro_rules! hash_type {
    ($(#[$doc:meta])* $name:ident, $context:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; 32]);

        impl $name {
            /// What separates this kind of hash from all others.
            pub(crate) const CONTEXT: &'static str = $context;

            /// Takes bytes that are already a hash of this kind.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The hash itself.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// Hashes `bytes` in the context of this kind of object.
            #[must_use]
            pub fn of(bytes: &[u8]) -> Self {
                static KEY: LazyLock<ContextKey> =
                    LazyLock::new(|| hash_derive_key_context($name::CONTEXT));
                let mut hasher = blake3::Hasher::new_from_context_key(&KEY);
                hasher.update(bytes);
                Self(*hasher.finalize().as_bytes())
            }

            /// The part of the id that packs and the index keep.
            #[must_use]
            pub(crate) fn key(&self) -> ObjectKey {
                ObjectKey::cut(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseHashError;

            fn from_str(text: &str) -> Result<Self, ParseHashError> {
                parse_hex(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    let text = String::deserialize(deserializer)?;
                    text.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; 32]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

hash_type!(
    /// Names a chunk by its plaintext.
    ChunkId,
    "coppice 2026-11 chunk v1"
);
hash_type!(
    /// Names a node of a tree by its full encoding.
    NodeId,
    "coppice 2026-11 tree node v1"
);
hash_type!(
    /// Names an image: its bytes, its length and how it was split.
    Root,
    "coppice 2026-11 image root v1"
);
hash_type!(
    /// Names a snapshot record.
    SnapshotId,
    "coppice 2026-11 snapshot v1"
);
hash_type!(
    /// Names an entry of the catalog's history.
    EventId,
    "coppice 2026-11 catalog event v1"
);

/// The first 160 bits of an object's id, which is what packs and the index
/// keep to find it. Whoever reads the object compares the whole id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ObjectKey(pub(crate) [u8; ObjectKey::LEN]);

impl ObjectKey {
    /// Bytes of a key.
    pub(crate) const LEN: usize = 20;

    fn cut(hash: &[u8; 32]) -> Self {
        let mut key = [0; Self::LEN];
        key.copy_from_slice(&hash[..Self::LEN]);
        Self(key)
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Names a pack of one store. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PackId(pub u64);

impl PackId {
    /// Ids stay below this, so that a pack and an entry fit into 64 bits.
    pub(crate) const LIMIT: u64 = 1 << 40;

    /// The last one that has a file name: twelve digits.
    pub(crate) const LAST: Self = Self(999_999_999_999);

    /// The pack's file inside the store.
    pub(crate) fn path(self) -> String {
        format!("{}/{self}.pack", crate::units::PACKS_DIR)
    }

    /// The id in a file name such as `000000000007.pack`.
    pub(crate) fn from_file_name(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".pack")?;
        if digits.len() != 12 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        digits.parse().ok().filter(|id| *id < Self::LIMIT).map(Self)
    }
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012}", self.0)
    }
}

/// A name that a person gave to a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// A text that cannot be a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` cannot be a name: use 1 to 200 of A-Z a-z 0-9 . _ : / - and begin with a letter or digit"
)]
pub struct NameError(pub String);

impl Name {
    /// Longest name in bytes.
    pub const LEN_MAX: usize = 200;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let begins = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let continues = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:/-".contains(&b));
        if begins && continues && text.len() <= Self::LEN_MAX {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError(text.chars().take(Self::LEN_MAX + 1).collect()))
        }
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_hashes_differ() {
        let bytes = b"the same bytes";
        assert_ne!(ChunkId::of(bytes).as_bytes(), NodeId::of(bytes).as_bytes());
        assert_eq!(ChunkId::of(bytes), ChunkId::of(bytes));
    }

    #[test]
    fn hashes_survive_text() {
        let id = SnapshotId::of(b"x");
        assert_eq!(id.to_string().parse::<SnapshotId>(), Ok(id));
        assert_eq!("12".parse::<SnapshotId>(), Err(ParseHashError));
    }

    #[test]
    fn names_are_checked() {
        for good in ["a", "debian:12", "a/b-c_d.e", &"n".repeat(200)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "/a", "a b", "a\n", "ä", &"n".repeat(201)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pack_file_names_survive() {
        let pack = PackId(7);
        assert_eq!(pack.path(), "packs/000000000007.pack");
        assert_eq!(PackId::from_file_name("000000000007.pack"), Some(pack));
        assert_eq!(PackId::from_file_name("7.pack"), None);
        assert_eq!(PackId::from_file_name("999999999999999.pack"), None);
    }
}
