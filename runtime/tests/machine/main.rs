//! Whole machines in processes of their own, driven over the channel.
//!
//! Needs `/dev/kvm`, and a guest kernel named by `COPPICE_GUEST_KERNEL`.

mod guest;
mod harness;
mod lifecycle;
mod refusals;
