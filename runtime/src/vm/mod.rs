//! The machine process: one KVM machine, driven over a channel.

mod boot;
mod build;
mod bus;
mod chips;
mod machine;
mod regions;
mod server;
mod state;
mod wiring;

pub use server::vmm_main;
