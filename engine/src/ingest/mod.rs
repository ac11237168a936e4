//! Ingest: bytes become chunks, frames, packs, trees and at last a snapshot.
//!
//! The order is what makes it safe: seal the pack, flush, rename, flush the
//! folder, publish to the index, append to the root log, flush. A session that
//! never commits leaves packs behind that no root names.

mod appender;
mod commit;
mod compute;
mod frames;
mod gather;
mod import;
mod overlay;
mod packer;
pub(crate) mod qcow2;
mod session;
mod sink;
mod stream;
mod stream_root;
mod task;
mod writer;

pub use commit::{CommitOptions, Committed};
pub use compute::tree_root_of;
pub use import::{DiskFormat, ImportKind, ImportOptions, ImportReport};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use qcow2::read_all as read_qcow2;
pub use session::Session;
pub use stream::StreamWriter;
pub use stream_root::stream_root_of;
pub use writer::ImageWriter;

/// How far a long operation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done, holes included.
    pub done: u64,
    /// Bytes in total, if that is known.
    pub total: Option<u64>,
    /// Of an ingest: bytes so far that the store did not have. What was done
    /// last may not be counted yet.
    pub new_bytes: u64,
}
