//! The agent itself: what runs inside the machine.
//!
//! [`Agent::serve`] answers one connection and knows nothing of where it came
//! from, so tests drive it over a socket pair; [`run_as_init`] and
//! [`run_as_service`] put it behind the machine's vsock port.

mod agent;
mod children;
mod copy;
mod ethernet;
mod exec;
mod init;
mod link;
mod listen;
mod renew;
mod shutdown;
mod spawn;

pub use agent::{Agent, AgentError, Ended, Settings};
pub use init::{InitError, run_as_init};
pub use listen::{ListenError, run_as_service};
pub use renew::Targets;
