//! The supervisor's side of the processes it runs: one handle for each
//! machine's process and one for the page server.

mod claims;
mod nursery;
mod pager;
mod peer;
mod process;
mod vmm;
mod zygote;

pub use nursery::{Expected, Nursery};
pub use pager::{Pager, PagerStats, Patience};
pub use peer::{News, Peer, PeerError};
pub use process::Program;
pub use vmm::{Built, SavedMachine, Vmm};
pub use zygote::{Unborn, Zygote};
