//! What the bench and the process of one fork say to each other.

use serde::{Deserialize, Serialize};

use crate::guest::Walk;
use crate::machine::Steps;

/// What kind of memory a machine gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A private mapping of a memory file that holds everything. One descriptor: the file.
    Bare,
    /// A private mapping of a pool, registered for missing pages. One descriptor: the pool.
    Pooled,
    /// Memory of its own, registered for missing pages.
    Anonymous {
        /// Length in bytes.
        len: u64,
    },
}

/// From the bench to the fork's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Makes bare and pooled machines in turn and drops each again. Two
    /// descriptors: the memory file and the pool. Answered by [`Answer::Raced`].
    Race {
        /// How many of each.
        rounds: u32,
    },
    /// Makes a machine and maps its memory. Answered by [`Answer::Mapped`].
    Map(Kind),
    /// Completes the machine. Answered by [`Answer::Running`].
    Run,
    /// Lets the guest walk. Answered by [`Answer::Walked`].
    Walk(Walk),
    /// Reads pages from the host's side. Answered by [`Answer::Touched`].
    Touch {
        /// The first page.
        first: u64,
        /// Pages from one to the next.
        stride: u64,
        /// How many.
        count: u64,
    },
    /// Maps all that is resident. Answered by [`Answer::Done`].
    Populate,
    /// Lets the guest walk until it is stopped. Answered by [`Answer::Done`].
    Begin(Walk),
    /// Stops the guest. Answered by [`Answer::Stopped`].
    Stop,
    /// Lets the stopped guest go on. Answered by [`Answer::Done`].
    GoOn,
}

/// From the fork's process to the bench.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answer {
    /// What each machine took.
    Raced {
        /// On plain memory.
        bare: Vec<Steps>,
        /// On the pool.
        pooled: Vec<Steps>,
    },
    /// Memory is there. Descriptors: the pagemap, and the userfaultfd if there is one.
    Mapped {
        /// Where it lies in the process.
        address: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The first instruction has run.
    Running(Steps),
    /// The guest has made its walk.
    Walked {
        /// What it took in nanoseconds.
        ns: u64,
    },
    /// All pages were read.
    Touched {
        /// What each took in nanoseconds.
        ns: Vec<u64>,
    },
    /// The guest stands still.
    Stopped {
        /// What it counts down in each step of its walk.
        counter: u64,
    },
    /// It is so.
    Done,
    /// It could not.
    Failed(String),
}
