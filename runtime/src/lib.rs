//! The machine runtime: KVM machines whose memory and disks come lazily from
//! a content-addressed store, page by page, shared by all their forks.

mod devices;
pub mod fault;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod host;
pub mod jail;
mod memory;
mod pages;
pub mod pieces;
pub mod protocol;
pub mod sys;
mod vcpu;
mod vm;

pub use fault::{PagerError, pager_main};
pub use sys::memfd::{HugePagesError, refuse_huge_pages as check_huge_pages};
pub use sys::pagemap::{PageCounts, Pagemap, PagemapError};
pub use sys::remote_memory::{RemoteMemory, RemoteMemoryError};
pub use vm::{vmm_main, zygote_main};
