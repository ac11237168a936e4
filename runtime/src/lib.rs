//! The machine runtime: KVM machines whose memory and disks come lazily from
//! a content-addressed store, page by page, shared by all their forks.

pub mod host;
pub mod protocol;
pub mod sys;
