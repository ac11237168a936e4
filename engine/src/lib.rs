//! The engine of Coppice: a content-addressed store for images of memory,
//! disks and byte streams, and for snapshots of whole machines made of them.
//!
//! Layers, each using only those before it:
//!
//! ```text
//! id, units, error, env, settings -> io | chunk -> pack -> index | tree
//!     -> depot -> catalog -> lease -> ingest | read | account
//!     -> check | gc -> store
//! ```
//!
//! Packs and the root log are the truth; the index is derived. Every byte
//! that leaves the engine was verified against its hash.

mod account;
mod catalog;
mod check;
mod chunk;
mod depot;
mod env;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod gc;
mod id;
mod index;
mod ingest;
mod io;
mod lease;
mod ledger;
mod pack;
mod read;
mod settings;
mod store;
mod tree;
mod units;

pub use account::{Accounts, Bill, Frees, StoreBill};
pub use catalog::{Entry, Role, SnapshotRecord};
pub use check::{CheckReport, CheckScope, Damage, RepairReport};
pub use chunk::{Page, chunk_ids};
pub use env::Clock;
pub use error::{ErrorKind, FormatError, Qcow2Error, ReadCause, ReadError, StoreError};
pub use gc::{GcAction, GcFragmented, GcOptions, GcPack, GcPlan, GcReport, GcStep};
pub use id::{ChunkId, EventId, Name, NameError, NodeId, PackId, ParseHashError, Root, SnapshotId};
pub use index::SimIndex;
pub use ingest::{
    CommitOptions, Committed, DiskFormat, ImageWriter, ImportKind, ImportOptions, ImportReport,
    Progress, Session, StreamWriter, stream_root_of, tree_root_of,
};
pub use io::{Access, Counts, Disk, DiskFile, Faults, Listed, Room, SimDisk};
pub use lease::Lease;
pub use read::{Extent, Fetched, FrameRef, ImageReader, Location, PageMap, PageReader, ReadAhead};
pub use settings::{IndexKind, Settings};
pub use store::{Lookups, Stats, Store};
pub use tree::{ImageDiff, ImageRef, Splitter};
pub use units::{FORMAT_VERSION, FRAME_PLAIN_LEN_MAX, IMAGE_LEN_MAX, PACK_LEN_MAX, PAGE_LEN};
