//! What the supervisor, a machine's process and the page server say to each
//! other. Every message is small and typed; bulk data stays in descriptors
//! that travel beside it.
//!
//! Both servers answer requests in order with exactly one reply each, and may
//! send events at any time in between.

mod bounded;

use serde::{Deserialize, Serialize};

use self::bounded::{lists_of_runs, regions, runs};
use crate::pieces::Piece;

/// Guest pages and disk blocks are both this long, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// The vsock port on which the guest agent listens.
pub const AGENT_PORT: u32 = 1024;

/// What the guest can see of its machine. Part of every snapshot: two
/// machines with different configurations are different machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Guest memory in bytes, a multiple of [`PAGE_SIZE`].
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Block devices in the order of their names in the guest: vda, vdb, …
    pub disks: Vec<DiskConfig>,
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Length in bytes; a multiple of 512.
    pub len: u64,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// One network device. Not part of [`MachineConfig`]: each fork has another
/// address, and other cables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its ethernet address.
    pub mac: [u8; 6],
}

/// How a machine begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// Loads a kernel into empty memory.
    Boot {
        /// Kernel command line without the device declarations, which the
        /// machine adds.
        cmdline: String,
    },
    /// Continues from a saved instant.
    Restore {
        /// Bytes of a former [`VmmReply::Saved`].
        state: Vec<u8>,
        /// Which of the memory pools shows which pages, in order and without
        /// gaps.
        memory: Vec<Piece<u32>>,
        /// For each disk, the blocks of the overlays that lie frozen over its
        /// image, the oldest first.
        frozen: Vec<Vec<Vec<PageRun>>>,
    },
}

/// From the supervisor to the zygote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ZygoteRequest {
    /// Forks a process that will be a machine's. One descriptor: its end of the
    /// channel on which it takes [`VmmRequest`]. Answered by
    /// [`ZygoteReply::Spawned`].
    Spawn,
}

/// From the zygote to the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ZygoteMessage {
    /// The answer to the oldest unanswered request.
    Reply(Result<ZygoteReply, String>),
}

/// The answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ZygoteReply {
    /// The process exists. One descriptor: its pidfd.
    Spawned {
        /// Its process id.
        pid: u32,
    },
}

/// The zygote has no news of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZygoteEvent {}

/// From the supervisor to a machine's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmmRequest {
    /// Writes its log there from now on. One descriptor: a file to append to.
    /// Answered by [`VmmReply::Logging`].
    Log,
    /// Makes the machine, stopped before its first instruction.
    ///
    /// Descriptors, in this order: the console log (append); for each disk
    /// its pool (read-only memfd), then its overlay (read-write file, sparse,
    /// as long as the disk), then its frozen overlays (read-only files); for
    /// each network device its link (a tap, or any descriptor that moves one
    /// frame a call); then for [`Start::Boot`] the kernel file, for
    /// [`Start::Restore`] the memory pools (read-only memfds).
    /// Answered by [`VmmReply::Built`].
    Build {
        /// What the guest sees.
        config: MachineConfig,
        /// Its network devices, in the order of their names in the guest.
        nets: Vec<NetConfig>,
        /// How it begins.
        start: Start,
    },
    /// Lets the vCPUs run. Answered by [`VmmReply::Running`].
    Resume,
    /// Stops the vCPUs and parks the devices. Answered by [`VmmReply::Paused`].
    Pause {
        /// Give up, and let the machine go on, after this long.
        deadline_ms: u64,
    },
    /// Describes the paused machine. Answered by [`VmmReply::Saved`].
    Save,
    /// Describes the paused machine, and freezes each overlay in which it has
    /// written: a new one lies on top from now on. Descriptors: for each disk
    /// the new overlay. Answered by [`VmmReply::Saved`]; an overlay without
    /// blocks was not frozen, and its new one not taken.
    Freeze,
    /// Replaces frozen overlays by one that holds the same. One descriptor: the
    /// new one, read-only. Answered by [`VmmReply::Folded`].
    Fold {
        /// The disk, by its index.
        disk: u32,
        /// How many, from the oldest on.
        count: u32,
        /// The blocks of the new one.
        runs: Vec<PageRun>,
    },
    /// Reads a byte of every page of guest memory, so that all of it is
    /// present. Answered by [`VmmReply::Populated`] when it is.
    Populate,
    /// Opens a stream to a guest port. One descriptor: the host's end, a
    /// stream socket that the machine serves from now on. Answered by
    /// [`VmmReply::Connecting`] at once; a refusal by the guest closes the
    /// socket.
    Connect {
        /// vsock port in the guest.
        port: u32,
    },
    /// Ends the process. Answered by [`VmmReply::Stopping`].
    Stop,
}

/// From a machine's process to the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmmMessage {
    /// The answer to the oldest unanswered request.
    Reply(Result<VmmReply, String>),
    /// Something that happened by itself.
    Event(VmmEvent),
}

/// The answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmmReply {
    /// The log is written where it was asked for.
    Logging,
    /// The machine exists. Descriptors, in this order: the userfaultfd with
    /// every pooled region registered, `/proc/self/pagemap`, `/proc/self/mem`.
    Built {
        /// Where its memory and disk caches lie in the process.
        #[serde(deserialize_with = "regions")]
        regions: Vec<Region>,
    },
    /// The vCPUs run.
    Running {
        /// `CLOCK_MONOTONIC` just before the first vCPU entered the guest, in
        /// nanoseconds.
        entered_ns: u64,
    },
    /// No vCPU runs and no device touches memory or overlays until `Resume`.
    Paused,
    /// Everything but memory and disks.
    Saved {
        /// Serialized machine state.
        state: Vec<u8>,
        /// For each disk, the blocks its newest overlay holds, as ascending
        /// runs.
        #[serde(deserialize_with = "lists_of_runs")]
        overlays: Vec<Vec<PageRun>>,
        /// The pages that the guest has ever freed, as ascending runs. Those
        /// that are not the machine's own now are zero.
        #[serde(deserialize_with = "runs")]
        freed: Vec<PageRun>,
    },
    /// The frozen overlays are one.
    Folded,
    /// All of guest memory is present.
    Populated,
    /// The stream is being set up.
    Connecting,
    /// The process ends now.
    Stopping,
}

/// Unasked news from a machine's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmmEvent {
    /// The machine is over. Its process keeps its memory until it is stopped:
    /// there may be captures whose pages are not all copied.
    Exited {
        /// Why, for a person.
        reason: String,
        /// Whether the guest asked for it.
        clean: bool,
    },
}

/// A run of pages: `first..first + count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// Index of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

/// What a region of a machine process's address space holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Content {
    /// Guest memory.
    Memory,
    /// The read cache of a disk, by its index.
    Disk(u32),
}

/// A mapping in a machine's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Which image it shows.
    pub content: Content,
    /// Host virtual address in that process.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where in the image it starts, in bytes.
    pub offset: u64,
    /// Whether a pool backs it, so that its faults go to the page server.
    pub pooled: bool,
}

/// Names a pool, also to the page server that takes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PoolId(pub u64);

/// Names a machine, also to the page server that takes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MachineKey(pub u64);

/// From the supervisor to the page server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PagerRequest {
    /// Gives the page server a pack to read from. One descriptor: the pack,
    /// read-only. Packs already known are ignored. Answered by
    /// [`PagerReply::Done`].
    AddPack {
        /// The engine's pack id.
        pack: u64,
    },
    /// Makes an empty pool for an image. One descriptor: the image's page
    /// map, as the engine serialized it. Answered by [`PagerReply::Pool`].
    OpenPool {
        /// The name of the new pool.
        pool: PoolId,
    },
    /// Says where the pages of a pool's image lie since a collection. One
    /// descriptor: the page map. Answered by [`PagerReply::Done`].
    RenewPool {
        /// Which.
        pool: PoolId,
    },
    /// Closes packs that no pool's page map names any more. Answered by
    /// [`PagerReply::Done`].
    ForgetPacks {
        /// Their ids.
        packs: Vec<u64>,
    },
    /// Forgets a pool that no machine uses. Answered by [`PagerReply::Done`].
    ClosePool {
        /// Which.
        pool: PoolId,
    },
    /// Serves a machine's faults from now on. One descriptor: its
    /// userfaultfd. Answered by [`PagerReply::Done`].
    Attach {
        /// The name of the machine.
        machine: MachineKey,
        /// Its pooled mappings, each with its pool.
        regions: Vec<(PoolId, Region)>,
    },
    /// Makes an empty layer for pages of a machine, and prepares the machine
    /// for being frozen: from now on its memory can be protected. Two
    /// descriptors: the machine's `/proc/self/pagemap` and `/proc/self/mem`.
    /// Answered by [`PagerReply::Layer`].
    OpenLayer {
        /// The name of the new layer, among those of the pools.
        layer: PoolId,
        /// The machine.
        machine: MachineKey,
        /// Where its memory lies in its process, contiguous.
        address: u64,
        /// Length of its memory in bytes.
        len: u64,
    },
    /// Makes what a stopped machine has written belong to a layer: the pages
    /// are protected and then copied while the machine goes on, each before it
    /// changes. Answered by [`PagerReply::Frozen`]; when the last page is
    /// copied, [`PagerEvent::LayerDone`] follows.
    Freeze {
        /// An empty layer.
        layer: PoolId,
        /// More pages than this are refused, and nothing is changed.
        pages_max: u64,
    },
    /// Says which pages of a frozen layer its machine has freed: those that the
    /// layer does not have are zero. Before anybody maps it. Answered by
    /// [`PagerReply::Done`].
    ClearLayer {
        /// Which.
        layer: PoolId,
        /// The pages, as ascending runs.
        freed: Vec<PageRun>,
    },
    /// Which pages a frozen layer has of its machine. Answered by
    /// [`PagerReply::Runs`].
    LayerRuns {
        /// Which.
        layer: PoolId,
    },
    /// Which pages a machine was the first to touch, for as long as that is
    /// noted. Answered by [`PagerReply::Touched`].
    Touched {
        /// Which.
        machine: MachineKey,
    },
    /// Fetches pages that a machine will touch, in this order, when nobody
    /// waits for others, and no longer than the machine is served. Answered at
    /// once by [`PagerReply::Done`].
    Prefetch {
        /// For whom.
        machine: MachineKey,
        /// Pages of its pools.
        pages: Vec<(PoolId, u64)>,
    },
    /// How much memory the pools may take together. Answered by
    /// [`PagerReply::Done`].
    Budget {
        /// In bytes.
        bytes: u64,
    },
    /// Stops serving a machine. Answered by [`PagerReply::Machine`].
    Detach {
        /// Which.
        machine: MachineKey,
    },
    /// Takes over a pool from a page server that has ended. Two descriptors:
    /// the image's page map, and the pool's memory as [`PagerReply::Pool`] gave
    /// it. Answered by [`PagerReply::Done`].
    AdoptPool {
        /// Its name.
        pool: PoolId,
    },
    /// Takes over a layer from a page server that has ended. Two descriptors:
    /// its memory and its record, as [`PagerReply::Layer`] gave them. Answered
    /// by [`PagerReply::Done`].
    AdoptLayer {
        /// Its name.
        layer: PoolId,
        /// Length of the machine's memory in bytes.
        len: u64,
        /// The pools that its gaps are filled from, all of them taken over.
        below: Vec<(PageRun, PoolId)>,
        /// Whether [`PagerReply::Frozen`] was seen.
        frozen: bool,
        /// Why pages are lost, if it is known that they are.
        lost: Option<String>,
    },
    /// Takes over a machine from a page server that has ended: goes on with its
    /// captures, and has all its threads that wait for a page ask again.
    /// Descriptors: its userfaultfd, and if it was ever prepared for being
    /// frozen, its `/proc/self/pagemap` and `/proc/self/mem`. Answered by
    /// [`PagerReply::Done`].
    AdoptMachine {
        /// Its name.
        machine: MachineKey,
        /// Its pooled mappings, each with its pool.
        regions: Vec<(PoolId, Region)>,
        /// First address and length of its memory, if it was ever prepared for
        /// being frozen.
        memory: Option<(u64, u64)>,
        /// Its layers that are not done.
        layers: Vec<PoolId>,
    },
    /// Counters. Answered by [`PagerReply::Stats`].
    Stats,
}

/// From the page server to the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PagerMessage {
    /// The answer to the oldest unanswered request.
    Reply(Result<PagerReply, String>),
    /// Something that happened by itself.
    Event(PagerEvent),
}

/// The answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PagerReply {
    /// It is so.
    Done,
    /// A pool is ready. Two descriptors: its memfd, read-only, and the same
    /// for a later page server, which may write to it.
    Pool,
    /// A layer is ready. Three descriptors: as for a pool, and the record of
    /// what belongs to it.
    Layer,
    /// The machine may go on.
    Frozen {
        /// How many pages it had written.
        pages: u64,
    },
    /// Pages, as ascending runs that do not touch.
    Runs(Vec<PageRun>),
    /// Pages in the order in which they were touched first, none twice.
    Touched(Vec<(PoolId, u64)>),
    /// The last counters of a machine.
    Machine(MachineFaults),
    /// All counters.
    Stats {
        /// Every pool.
        pools: Vec<(PoolId, PoolStats)>,
        /// Every attached machine.
        machines: Vec<(MachineKey, MachineFaults)>,
    },
}

/// Counters of one pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStats {
    /// Length of the image in bytes.
    pub len: u64,
    /// Pages resident in the pool.
    pub resident_pages: u64,
    /// Pages that were read from the store, verified and installed.
    pub stored_pages: u64,
    /// Pages installed as zeros because the image has a hole there.
    pub zero_pages: u64,
    /// Frames read from the store.
    pub frames_read: u64,
    /// Bytes read from packs.
    pub bytes_read: u64,
    /// Of the frames, those that were read before anybody waited for them.
    pub frames_prefetched: u64,
    /// Pages that were dropped to stay within the budget.
    pub evicted_pages: u64,
}

/// Counters of one machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFaults {
    /// Faults that reached the page server.
    pub faults: u64,
    /// Of these, those that had to read the store.
    pub store_faults: u64,
    /// Pages installed in pools on behalf of this machine, neighbours
    /// included.
    pub pages_installed: u64,
}

/// Unasked news from the page server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PagerEvent {
    /// A page that a machine needs cannot be had. The page is poisoned in
    /// that machine, which must be stopped.
    PageLost {
        /// The machine that faulted.
        machine: MachineKey,
        /// The pool.
        pool: PoolId,
        /// Page index in the image.
        page: u64,
        /// Names the chunk, the pack and what is wrong.
        error: String,
    },
    /// A layer needs its machine no more.
    LayerDone {
        /// Which.
        layer: PoolId,
        /// Why pages of it are lost, if they are.
        error: Option<String>,
    },
}
