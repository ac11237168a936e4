//! The machine runtime: KVM machines whose memory and disks come lazily from
//! a content-addressed store, page by page, shared by all their forks.

pub mod fault;
pub mod host;
pub mod protocol;
pub mod sys;

pub use fault::{PagerError, pager_main};
pub use sys::pagemap::{PageCounts, Pagemap, PagemapError};
pub use sys::remote_memory::{RemoteMemory, RemoteMemoryError};
