//! What the host and the guest agent say to each other.
//!
//! A connection begins with [`Request::Hello`] and then carries operations one
//! after the other; the first operation may follow the greeting without
//! waiting. Every message is one frame (see [`crate::frame`]). A message that
//! carries bulk data ([`Request::Stdin`], [`Reply::Stdout`], `Data`, …) has it
//! as the frame's payload, beside the typed part, so it is never copied
//! through the encoder.
//!
//! ```text
//! host   Hello ─ Exec ─ Stdin* ─ StdinEof ──────────────────── next operation
//! guest            Started ─ (Stdout | Stderr | StdinCredit)* ─ Exited
//!
//! host   Hello ─ Put ─ (Entry ─ Data*)* ─ End ─────────────── next operation
//! guest                                        Copied | Refused
//! ```
//!
//! Invariant: the agent never waits for the host to read before it reads what
//! the host sends. Standard input is limited by credit for that reason: the
//! host may send [`STDIN_WINDOW`] bytes and then as many as it is granted.

use serde::{Deserialize, Serialize};

/// The vsock port on which the agent listens.
pub const AGENT_PORT: u32 = 1024;

/// Version of this protocol. The agent refuses any other.
pub const VERSION: u32 = 1;

/// Longest frame body in bytes. Nothing longer is read or allocated.
pub const MAX_FRAME: usize = 128 << 10;

/// Longest payload that either side sends in one frame.
pub const MAX_DATA: usize = 16 << 10;

/// Bytes of standard input the host may send before it is granted more.
pub const STDIN_WINDOW: usize = 64 << 10;

/// The generation of a machine that has booted and was never given one.
pub const BOOT_GENERATION: u64 = 0;

/// Least entropy that a renewal brings, in bytes.
pub const MIN_ENTROPY: usize = 64;

/// Most entropy that a renewal may bring, in bytes.
pub const MAX_ENTROPY: usize = 4096;

/// From the host to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Opens a connection.
    Hello {
        /// Must be [`VERSION`].
        version: u32,
        /// Which machine the host believes it is talking to. Until the agent
        /// has carried out [`Request::Renew`] with this very generation it
        /// answers only `Ping` and `Renew`, so nothing is ever answered by a
        /// restored machine that still has its ancestor's identity.
        generation: u64,
    },
    /// Is the agent there? Answered by [`Reply::Pong`].
    Ping,
    /// Gives the machine its own identity. Answered by [`Reply::Renewed`].
    Renew(Identity),
    /// Runs a program. Answered by [`Reply::Started`] or a refusal.
    Exec(Exec),
    /// Payload: bytes for the program's standard input.
    Stdin,
    /// No more standard input comes.
    StdinEof,
    /// Sends a signal, by number, to the program's process group.
    Signal(i32),
    /// The host's terminal has a new size.
    Resize(WindowSize),
    /// Copies a tree into the guest: [`Request::Entry`], [`Request::Data`] and
    /// [`Request::End`] follow. Answered by [`Reply::Copied`].
    Put {
        /// Where to. An existing directory receives the tree under `name`;
        /// otherwise this is the tree's new path.
        path: Vec<u8>,
        /// The tree's name at its source.
        name: Vec<u8>,
    },
    /// Copies a tree out of the guest: [`Reply::Top`] and then
    /// [`Reply::Entry`] and [`Reply::Data`] follow, then [`Reply::Copied`].
    Get {
        /// What to copy.
        path: Vec<u8>,
    },
    /// The next file of a [`Request::Put`].
    Entry(Entry),
    /// Payload: bytes of the entry before it, which is a regular file.
    Data,
    /// The tree is complete.
    End,
    /// Writes everything to disk and ends the machine. Answered by
    /// [`Reply::ShuttingDown`], after which the connection is of no more use.
    Shutdown,
}

/// From the agent to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The agent is there.
    Pong {
        /// Its protocol version.
        version: u32,
        /// The generation of its last renewal.
        generation: u64,
    },
    /// The machine has its own identity now.
    Renewed {
        /// The generation that it took.
        generation: u64,
    },
    /// The program runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Payload: what the program wrote to standard output (or its terminal).
    Stdout,
    /// Payload: what the program wrote to standard error.
    Stderr,
    /// This many more bytes of standard input may be sent.
    StdinCredit(u32),
    /// The program is over; the last message of an `Exec`.
    Exited(ExitStatus),
    /// A tree follows: its name at its source.
    Top {
        /// Last component of the path that was asked for.
        name: Vec<u8>,
    },
    /// The next file of a [`Request::Get`].
    Entry(Entry),
    /// Payload: bytes of the entry before it, which is a regular file.
    Data,
    /// The copy is complete.
    Copied(CopyReport),
    /// The machine ends now.
    ShuttingDown,
    /// The operation was not carried out, or not to its end.
    Refused {
        /// What the caller can do about it.
        kind: RefusalKind,
        /// One line for a person: the thing, the cause, what to do.
        message: String,
    },
}

/// What makes one machine different from its siblings.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Unique among all machines that grew from one snapshot.
    pub generation: u64,
    /// Fresh secret random bytes, [`MIN_ENTROPY`] to [`MAX_ENTROPY`] of them.
    pub entropy: Vec<u8>,
    /// Wall clock time in nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Host name: 1 to 63 letters, digits and hyphens.
    pub hostname: String,
    /// Machine id: 32 lower-case hexadecimal digits.
    pub machine_id: String,
    /// Ethernet addresses of its network devices. An agent that knows nothing
    /// of them does not look this far.
    pub ethernet: Vec<[u8; 6]>,
}

impl std::fmt::Debug for Identity {
    /// Leaves the entropy out: it is a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("generation", &self.generation)
            .field("entropy_len", &self.entropy.len())
            .field("realtime_ns", &self.realtime_ns)
            .field("hostname", &self.hostname)
            .field("machine_id", &self.machine_id)
            .field("ethernet", &self.ethernet)
            .finish()
    }
}

/// A program to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments; a program without a slash is looked up in PATH.
    pub argv: Vec<Vec<u8>>,
    /// Variables set in addition to the agent's own environment.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory; the agent's home directory if absent.
    pub cwd: Option<Vec<u8>>,
    /// Run it on a terminal of this size.
    pub tty: Option<WindowSize>,
    /// Whether standard input follows; otherwise it is `/dev/null`.
    pub stdin: bool,
    /// What becomes of the program when the connection breaks: it goes on,
    /// with its output discarded, or its process group is killed. In a restored
    /// machine every connection of its ancestor is broken.
    pub detach: bool,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters per line.
    pub columns: u16,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It returned this code.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

impl ExitStatus {
    /// The code a shell would report: 128 + n for signal n.
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128u8.saturating_add(signal),
        }
    }
}

/// One file of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Path below the top of the tree; empty for the top itself, which comes
    /// first. Parents come before their children.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Time of the last change to its content, nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    /// A regular file; its bytes follow.
    File {
        /// Permission bits.
        mode: u32,
    },
    /// A directory.
    Directory {
        /// Permission bits.
        mode: u32,
    },
    /// A symbolic link.
    Symlink {
        /// What it points at, not interpreted.
        target: Vec<u8>,
    },
}

/// What a copy moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyReport {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of regular files.
    pub bytes: u64,
    /// Sockets, devices and pipes, which are not copied.
    pub skipped: u64,
}

/// What the caller can do about a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// Renew the machine first: it has not taken the caller's generation.
    NotRenewed,
    /// The program does not exist; a shell returns 127.
    CommandNotFound,
    /// The program cannot be run; a shell returns 126.
    CannotExecute,
    /// The request makes no sense or would leave its target directory.
    Invalid,
    /// A file is missing.
    NotFound,
    /// A disk is full.
    NoSpace,
    /// The guest's system refused, as the message says.
    System,
}
