//! The page server: page pools, and the faults of the machines that map them.
//!
//! A pool is the memory of one image, empty at first. Machines map it
//! privately, so a page that one of them made the page server fetch is there
//! for all, and what a machine writes is its own. A fault goes
//!
//! ```text
//! machine's userfaultfd -> worker -> resident? ------------------> wake
//!                                    hole?     -> zeros installed -> wake
//!                                    stored    -> one fetch per frame
//!                                                 -> installed, neighbours too -> wake all that wait
//! ```
//!
//! A machine is captured while it goes on: `capture` has how.
//!
//! A pool is also a cache: `keeper` drops pages that the store has.
//!
//! Invariants: a page becomes visible whole and verified or not at all
//! (`sys::side`); a thread that waits is woken by the page or
//! by poison, never left; no lock is held across a read of the store.

mod capture;
mod engine;
mod keeper;
mod layer;
mod machine;
mod outbox;
mod pool;
mod prefetch;
mod queue;
mod record;
mod scripted;
mod serve;
mod server;
mod source;
mod takeover;
#[cfg(test)]
mod tests;
mod touched;
mod worker;

pub use engine::{EngineLibrary, EngineSource};
pub use scripted::{Script, ScriptedLibrary};
pub use serve::{PagerError, pager_main, serve_pages};
pub use server::Settings;
pub use source::{Extent, Fetched, FrameKey, Library, Page, PageSource, SourceError};
