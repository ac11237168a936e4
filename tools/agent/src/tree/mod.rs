//! Trees of files on their way from one side to the other, in either
//! direction. Neither side trusts the other: [`receive`] creates nothing
//! outside the directory that its caller named, whatever entries arrive.

mod path;
mod receive;
mod send;

use std::io;
use std::path::PathBuf;

pub(crate) use path::to_path;
pub(crate) use receive::{Modes, Receiver};
pub(crate) use send::{Outgoing, send, top_name};

use crate::protocol::RefusalKind;

/// Why a tree could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A local file could not be used.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The other side named a file that must not be created.
    #[error("refused the entry {name:?}: {why}")]
    Hostile {
        /// The name as it arrived.
        name: String,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// The messages came in an impossible order.
    #[error("the copy is out of order: {0}")]
    OutOfOrder(&'static str),
}

impl TreeError {
    /// What the caller can do about it.
    pub(crate) fn kind(&self) -> RefusalKind {
        match self {
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => RefusalKind::NotFound,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => RefusalKind::NoSpace,
                _ => RefusalKind::System,
            },
            Self::Hostile { .. } | Self::OutOfOrder(_) => RefusalKind::Invalid,
        }
    }
}
