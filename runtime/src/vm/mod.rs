//! The machine process: one KVM machine, driven over a channel.

mod boot;
mod build;
mod bus;
mod chips;
mod kit;
mod machine;
mod regions;
mod server;
mod sources;
mod state;
mod wiring;
mod zygote;

pub use server::vmm_main;
pub use zygote::zygote_main;
