//! What the command line and the supervisor say to each other.
//!
//! One connection carries one request. The supervisor sends any number of
//! [`Message::Progress`] and then exactly one [`Message::Reply`]. Files cross
//! as descriptors, so the supervisor never opens a path on a caller's behalf.

use serde::{Deserialize, Serialize};

use crate::cable::Cable;

/// Both ends must agree on this number; it changes with any message.
pub(crate) const PROTOCOL: u32 = 19;

/// The first message of every connection, from the command line.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// [`PROTOCOL`] of the caller.
    pub(crate) protocol: u32,
    /// What it wants.
    pub(crate) request: Request,
}

/// A request, with the descriptors that travel beside it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Is anybody there?
    Ping,
    /// The first descriptor is the input; the others are what a qcow2 disk is
    /// written over.
    Import {
        name: String,
        stream: bool,
        format: ImportFormat,
    },
    /// One descriptor: the output.
    Export {
        name: String,
        part: Part,
        /// Write from the first byte to the last: it need not be a file.
        in_order: bool,
    },
    /// Some bytes of an image. One descriptor: where they go, one part after
    /// the other.
    Read {
        name: String,
        part: Part,
        extents: Vec<ReadExtent>,
    },
    Snapshots,
    Show {
        name: String,
    },
    Tag {
        name: String,
        new: String,
    },
    RemoveSnapshot {
        name: String,
    },
    Stats,
    /// What the store's bytes are for, and what removing a snapshot frees.
    Usage {
        name: Option<String>,
    },
    /// Where two snapshots differ.
    Diff {
        one: String,
        other: String,
    },
    /// The lineage; with what each snapshot costs, if asked.
    Lineage {
        usage: bool,
    },
    Check(Scope),
    Repair,
    /// Garbage collection.
    Collect {
        dry_run: bool,
        dead_percent_min: u8,
    },
    /// One descriptor: the kernel.
    Boot(Boot),
    /// Starts machines from a snapshot, or forks a machine.
    Fork(Fork),
    /// Captures a machine.
    Snapshot {
        machine: String,
        name: Option<String>,
        /// Only the disks.
        cold: bool,
    },
    Machines,
    /// Answered with one descriptor: a stream to the machine's agent.
    Agent {
        machine: String,
    },
    /// Answered with one descriptor: a stream to a vsock port.
    Connect {
        machine: String,
        port: u32,
    },
    /// Answered with one descriptor: the console log.
    Logs {
        machine: String,
    },
    Pause {
        machine: String,
        /// Keep all of it on the host.
        in_memory: bool,
    },
    /// Boots a machine that was shut down from its own disks.
    Start {
        machine: String,
    },
    Resume {
        machine: String,
    },
    Stop {
        machine: String,
        kill: bool,
    },
    RemoveMachine {
        machine: String,
        force: bool,
    },
    /// The memory of a machine that is not running, as a file. One
    /// descriptor: the output.
    DumpMemory {
        machine: String,
    },
    /// Page server counters.
    Pools,
    /// Ends the supervisor and every machine.
    Shutdown,
}

/// Bytes of an image to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReadExtent {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// How a disk lies in the file to import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum ImportFormat {
    /// qcow2 if the file begins as such, else raw
    Auto,
    /// Byte for byte
    Raw,
    /// QEMU's format
    Qcow2,
}

/// Which image of a snapshot to export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Part {
    /// The only image, or the first disk.
    Main,
    /// A disk by its index.
    Disk(u16),
    /// Guest memory.
    Memory,
    /// What a machine was booted with.
    Kernel,
}

/// Boots a kernel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Boot {
    pub(crate) name: Option<String>,
    pub(crate) disks: Vec<String>,
    pub(crate) memory_mib: u64,
    pub(crate) cpus: u32,
    /// Replaces the default kernel command line.
    pub(crate) cmdline: Option<String>,
    /// One for each network device.
    pub(crate) nets: Vec<Cable>,
}

/// Starts `count` machines that continue from one instant.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Fork {
    /// A machine's name or a snapshot's.
    pub(crate) source: String,
    pub(crate) count: u32,
    /// The first machine's name, or the prefix of all.
    pub(crate) name: Option<String>,
    /// Leaves them stopped before their first instruction.
    pub(crate) paused: bool,
    /// Refuses a machine as the source.
    pub(crate) snapshot_only: bool,
    /// One for each network device; none means as before.
    pub(crate) nets: Vec<Cable>,
    /// Whether to fetch what machines of this snapshot touched before.
    pub(crate) prefetch: bool,
}

/// From the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// The request was read and is being acted on. Before this, nothing has
    /// happened, and the caller may ask again.
    Accepted,
    Progress(Progress),
    Reply(Result<Reply, Failure>),
}

/// How far along a long request is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub(crate) what: String,
    pub(crate) done: u64,
    /// 0 if it is not known.
    pub(crate) total: u64,
    /// Whether the numbers are bytes.
    pub(crate) bytes: bool,
    /// Of an import: bytes that the store did not have.
    pub(crate) new_bytes: Option<u64>,
}

/// Why a request failed, ready to be shown.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    pub(crate) message: String,
}

/// Answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Pong {
        pid: u32,
        protocol: u32,
    },
    Done,
    Imported(Imported),
    Exported {
        bytes: u64,
        seconds: f64,
    },
    Snapshots(Vec<SnapshotLine>),
    Shown(Box<Shown>),
    Stats(StoreStats),
    Usage(Usage),
    Differs(Difference),
    Lineage(Vec<LineageLine>),
    Checked(Checked),
    Planned(coppice_engine::GcPlan),
    Collected(Collected),
    Forked(Forked),
    Captured(Captured),
    Machines(Vec<MachineLine>),
    Stream,
    /// The stream wants this generation in its greeting.
    Agent {
        generation: u64,
    },
    Pools(Pools),
}

/// `import --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Imported {
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) root: String,
    pub(crate) logical_bytes: u64,
    pub(crate) new_bytes: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) seconds: f64,
}

/// One line of `snapshots`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SnapshotLine {
    pub(crate) name: String,
    pub(crate) id: String,
    /// `machine`, `cold` (disks and what boots them), `disk` or `stream`.
    pub(crate) kind: String,
    pub(crate) logical_bytes: u64,
    /// Bytes this snapshot added to the store when it was made.
    pub(crate) stored_bytes: u64,
    /// Milliseconds since 1970.
    pub(crate) created_unix_ms: u64,
    pub(crate) parent: Option<String>,
}

/// One image of a snapshot.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ImageLine {
    /// `memory`, `disk0`, `state`, `kernel` or `stream`.
    pub(crate) part: String,
    pub(crate) root: String,
    pub(crate) logical_bytes: u64,
    /// Bytes of its pages or chunks that are not zero.
    pub(crate) data_bytes: u64,
}

/// `show --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Shown {
    pub(crate) snapshot: SnapshotLine,
    pub(crate) names: Vec<String>,
    pub(crate) images: Vec<ImageLine>,
    pub(crate) machine: Option<MachineShape>,
}

/// What the guest of a machine snapshot sees.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MachineShape {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u32,
    pub(crate) disks: Vec<u64>,
    /// Number of network devices.
    pub(crate) nets: usize,
    /// Of the kernel, where the snapshot has it.
    pub(crate) cmdline: Option<String>,
}

/// `stats --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StoreStats {
    pub(crate) logical_bytes: u64,
    pub(crate) unique_bytes: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) chunks: u64,
    pub(crate) packs: u64,
    pub(crate) snapshots: u64,
    /// What the last count found kept twice; absent before the first one.
    pub(crate) kept_twice_bytes: Option<u64>,
}

/// `gc --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Collected {
    pub(crate) report: coppice_engine::GcReport,
    pub(crate) seconds: f64,
}

/// `stats --usage` and `show --usage`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Usage {
    pub(crate) store: coppice_engine::StoreBill,
    /// Of the snapshot that was named.
    pub(crate) snapshot: Option<SnapshotUsage>,
    /// Tree nodes read to count all references.
    pub(crate) nodes_walked: u64,
    pub(crate) seconds: f64,
}

/// What a snapshot holds and would free: alone, and with all its descendants.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct SnapshotUsage {
    pub(crate) own: coppice_engine::Bill,
    pub(crate) subtree: coppice_engine::Bill,
    pub(crate) subtree_snapshots: u64,
}

/// `diff --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Difference {
    pub(crate) parts: Vec<PartDifference>,
    /// Tree nodes read to know it.
    pub(crate) nodes_walked: u64,
    pub(crate) seconds: f64,
}

/// Where one image of two snapshots differs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PartDifference {
    /// `memory`, `disk0`, `state`, `kernel` or `stream`.
    pub(crate) part: String,
    /// The snapshot that has it, if the other has not.
    pub(crate) only_in: Option<String>,
    /// Length in both, in bytes; 0 where it is absent.
    pub(crate) logical_bytes: [u64; 2],
    /// Bytes of the pages, or of chunks of streams, that differ.
    pub(crate) changed_bytes: u64,
    /// Ascending, never adjacent.
    pub(crate) extents: Vec<DiffExtent>,
    /// Extents that are not told because there are too many.
    pub(crate) extents_left_off: u64,
}

/// Whole pages, or parts of streams, that differ.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct DiffExtent {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// A snapshot in `tree --json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LineageLine {
    pub(crate) id: String,
    pub(crate) names: Vec<String>,
    pub(crate) kind: String,
    pub(crate) parent: Option<String>,
    /// The parent is named but not in the catalog any more.
    pub(crate) parent_removed: bool,
    pub(crate) logical_bytes: u64,
    /// Bytes that it added to the store when it was made.
    pub(crate) stored_bytes: u64,
    pub(crate) created_unix_ms: u64,
    pub(crate) usage: Option<coppice_engine::Frees>,
}

/// How much a check reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Scope {
    Full,
    Structure,
    Sample { percent: u8, seed: u64 },
}

/// `check --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Checked {
    pub(crate) ok: bool,
    pub(crate) scope: Scope,
    pub(crate) packs: u64,
    pub(crate) chunks: u64,
    /// Frames of pages that were not read.
    pub(crate) skipped_frames: u64,
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) problems: Vec<Problem>,
    /// Damaged frames that nothing needs: what they held is found elsewhere.
    pub(crate) healed_frames: u64,
    /// What a repair did before this was found.
    pub(crate) repaired: Option<coppice_engine::RepairReport>,
}

/// One damaged thing.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Problem {
    /// Names the pack, the offset and the chunk.
    pub(crate) what: String,
    /// The snapshots that need it.
    pub(crate) snapshots: Vec<String>,
}

/// `fork --json` and `run --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Forked {
    pub(crate) machines: Vec<Ready>,
    /// How long a running source stood still; 0 for a snapshot.
    pub(crate) parent_pause_us: u64,
    /// From the request until all of them ran.
    pub(crate) all_ready_us: u64,
}

/// A machine whose vCPU runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Ready {
    pub(crate) name: String,
    /// From the request until the first vCPU entered the guest.
    pub(crate) ready_us: u64,
}

/// `snapshot --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Captured {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    pub(crate) pause_us: u64,
    pub(crate) dirty_pages: u64,
    pub(crate) logical_bytes: u64,
    pub(crate) new_bytes: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) consistency: Consistency,
}

/// What whoever continues a snapshot finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Consistency {
    /// The machine itself, as it was at one instant.
    Whole,
    /// Disks as a guest that was shut down has left them.
    Stopped,
    /// Disks as after a power cut, right after the guest had flushed all.
    Flushed,
    /// Disks as after a power cut.
    Crash,
}

/// A machine's network device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NetLine {
    /// The host's end.
    pub(crate) tap: String,
    /// Ethernet address of the guest's end.
    pub(crate) mac: String,
}

/// One line of `ps`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MachineLine {
    pub(crate) name: String,
    /// `running`, `paused`, `suspended` (off the host), `stopped` or `failed`.
    pub(crate) state: String,
    /// Why it stopped or failed.
    pub(crate) reason: Option<String>,
    /// The snapshot it came from.
    pub(crate) snapshot: Option<String>,
    pub(crate) pid: Option<u32>,
    pub(crate) vcpus: u32,
    pub(crate) memory_bytes: u64,
    /// Guest pages that only this machine has.
    pub(crate) private_bytes: u64,
    /// Guest pages that it shares with its pool.
    pub(crate) shared_bytes: u64,
    /// Everything its process has, each shared page divided by its users.
    pub(crate) pss_bytes: u64,
    /// Page tables of its process.
    pub(crate) page_table_bytes: u64,
    /// What its process has besides guest memory.
    pub(crate) vmm_bytes: u64,
    pub(crate) overlay_bytes: u64,
    /// Faults that the page server answered.
    pub(crate) faults: u64,
    /// Of these, faults that read the store.
    pub(crate) store_faults: u64,
    /// Pages read from the store for it, neighbours included.
    pub(crate) pages_installed: u64,
    /// Its network devices, while it runs.
    pub(crate) nets: Vec<NetLine>,
}

/// Page server counters.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Pools {
    pub(crate) pid: u32,
    /// How often a page server has taken over from one that had ended.
    pub(crate) takeovers: u64,
    /// What all pools together may take now.
    pub(crate) budget_bytes: u64,
    /// What they take.
    pub(crate) resident_bytes: u64,
    pub(crate) pools: Vec<PoolLine>,
}

/// One pool.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PoolLine {
    pub(crate) root: String,
    pub(crate) len: u64,
    /// Machines and layers that use it.
    pub(crate) machines: u64,
    pub(crate) resident_pages: u64,
    pub(crate) stored_pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) frames_read: u64,
    pub(crate) bytes_read: u64,
    /// Of the frames, those that were read before anybody waited for them.
    pub(crate) frames_prefetched: u64,
    /// Pages that were dropped to stay within the budget.
    pub(crate) evicted_pages: u64,
}
