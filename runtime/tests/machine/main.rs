//! Whole machines in processes of their own, driven over the channel.
//!
//! Needs `/dev/kvm`, and a guest kernel named by `COPPICE_GUEST_KERNEL`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod guest;
mod harness;
mod jail;
mod lazy;
mod lifecycle;
mod pager;
mod refusals;
