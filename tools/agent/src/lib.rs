//! The guest agent and the host's side of its protocol.
//!
//! The agent runs inside a machine, as its first process or as a service on
//! anybody's disk, and does what the host asks over vsock: run programs, copy
//! files, and give the machine its own identity after a fork.
//!
//! ```text
//! host    Client ──┐                          ┌── guest::Agent
//!                  ├── protocol over frames ──┤
//!         tree ────┘                          └── tree
//! ```
//!
//! Invariant: system calls and page touches are expensive in the guest on some
//! hosts, so the agent forks nothing of its own size, keeps few threads and
//! reuses its buffers.

mod client;
mod frame;
pub mod guest;
mod protocol;
mod tree;

pub use client::{Captured, Client, ClientError, ExecEvent, ExecInput, ExecOutput};
pub use frame::{Assembler, FrameError, decode, encode, read_frame, write_frame};
pub use protocol::{
    AGENT_PORT, BOOT_GENERATION, CopyReport, Entry, EntryKind, Exec, ExitStatus, Identity,
    MAX_DATA, MAX_ENTROPY, MAX_FRAME, MIN_ENTROPY, RefusalKind, Reply, Request, STDIN_WINDOW,
    VERSION, WindowSize,
};
pub use tree::TreeError;
