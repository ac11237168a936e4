//! The jail of a machine's process.
//!
//! A guest that breaks out of its virtual machine finds itself in a process
//! that can reach its own machine and nothing more. Layers, each of which
//! holds by itself:
//!
//! - **Nothing to see**: an empty read-only root, a network without devices,
//!   no `/proc`; System V objects and host name of its own (`empty_root`).
//! - **Nobody**: a user id that no other process has, no capabilities, no way
//!   to get some (`privileges`).
//! - **Few system calls**: an allow list, with the reason for each
//!   (`filter`). No file can be opened, no process or socket made; and once the
//!   machine is made, no file mapped.
//!
//! The descriptors that it does hold are those of its machine: pools and
//! packs never writable, its overlays, its log and console, its channel.

mod empty_root;
mod filter;
mod privileges;

use std::io;

pub use empty_root::empty_root;

/// Why a process could not be jailed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A system call of the jail's construction failed.
    #[error("cannot jail the process: {step}: {source}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The filter could not be compiled or installed.
    #[error("cannot jail the process: system call filter: {0}")]
    Filter(String),
}

/// Names the step whose error is being passed on.
fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step { step, source: source.into() }
}

/// Sees to it that neither this process nor one that it forks gains a
/// capability that it does not have. Made once by the process from which all
/// machines are forked.
pub fn forgo_capabilities() {
    privileges::forgo();
}

/// Gives every privilege up for good, but for the system calls that anybody may
/// make. Only the calling thread is affected, so it must be the only one.
///
/// # Errors
/// If the kernel refuses a step.
pub fn drop_privileges() -> Result<(), JailError> {
    forgo_capabilities();
    privileges::drop_all()
}

/// Gives everything up for good. Only the calling thread is jailed, so it
/// must be the only one; threads that it starts are born in the jail. What
/// [`forgo_capabilities`] does must have been done.
///
/// # Errors
/// If the kernel refuses a step.
pub fn enter() -> Result<(), JailError> {
    privileges::drop_all()?;
    filter::install()
}

/// Gives up what only the making of a machine needed. All threads are affected,
/// whether they are jailed or not.
///
/// # Errors
/// If the kernel refuses.
pub fn settle() -> Result<(), JailError> {
    filter::settle()
}
