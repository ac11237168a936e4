//! The agent and its client, joined by a socket pair on the host.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod copy;
mod exec;
mod garbage;
mod identity;
mod support;
