//! One machine and what the supervisor holds of it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use coppice_engine::{ImageRef, Lease, SnapshotId};
use coppice_runtime::host::{Built, Pager, Vmm};
use coppice_runtime::protocol::{MachineConfig, MachineFaults, MachineKey};

use super::boots::Boots;
use super::freeze::Instant;
use super::memory_map::MemoryMap;
use super::net::Net;
use super::overlays::Stack;
use super::pools::Pool;
use super::trunk::Trunk;
use crate::cable::Cable;

/// What a machine is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    /// Its CPUs are stopped, and all of it is on the host.
    Paused,
    /// Off the host: all of it is in the store.
    Suspended,
    /// Ended as asked, by the guest or by a command.
    Stopped(String),
    /// Ended because something went wrong.
    Failed(String),
}

impl State {
    /// The word that `ps` shows.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::Stopped(_) => "stopped",
            Self::Failed(_) => "failed",
        }
    }

    /// Why it ended, if it has.
    pub(crate) fn reason(&self) -> Option<&str> {
        match self {
            Self::Running | Self::Paused | Self::Suspended => None,
            Self::Stopped(reason) | Self::Failed(reason) => Some(reason),
        }
    }

    /// Whether its process is there.
    pub(crate) fn is_alive(&self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

/// The images that a machine's unchanged pages and blocks come from, and the
/// snapshot they belong to.
#[derive(Debug, Clone)]
pub(crate) struct Lineage {
    pub(crate) snapshot: Option<SnapshotId>,
    /// `None` for a machine that booted into empty memory.
    pub(crate) memory: Option<ImageRef>,
    pub(crate) disks: Vec<ImageRef>,
    /// What the disks are booted with, once the store has it.
    pub(crate) kernel: Option<ImageRef>,
    /// Keeps these images from being collected: the next capture builds on
    /// them. `None` once there will be no other capture.
    #[expect(dead_code, reason = "what counts is when it is dropped")]
    pub(crate) lease: Option<Arc<Lease>>,
    /// When it was: the images have the blocks of overlays that were frozen
    /// until then.
    pub(crate) instant: Instant,
}

impl Lineage {
    /// Of a machine that will not be captured again.
    pub(crate) fn ended() -> Self {
        let (snapshot, memory, disks, kernel) = (None, None, Vec::new(), None);
        Self { snapshot, memory, disks, kernel, lease: None, instant: Instant(0) }
    }
}

/// What a machine continues.
#[derive(Debug, Clone)]
pub(crate) enum Descent {
    /// Images of the store.
    Stored(Lineage),
    /// A live machine at an instant that the store may not have yet.
    Live(Arc<Trunk>),
}

/// The parts of a machine that exist only while its process does.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) vmm: Vmm,
    pub(crate) built: Built,
    pub(crate) nets: Vec<Net>,
    /// The page server that has its pools.
    pub(crate) pager: Arc<Pager>,
    /// What it has written to each disk.
    pub(crate) disks: Mutex<Vec<Stack>>,
    /// The pools of its memory; none if it booted into empty memory.
    pub(crate) memory: MemoryMap,
    /// The pool of each disk.
    pub(crate) disk_pools: Vec<Arc<Pool>>,
}

/// A machine.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) name: String,
    pub(crate) key: MachineKey,
    pub(crate) folder: PathBuf,
    pub(crate) config: MachineConfig,
    /// Where its network devices lead.
    pub(crate) nets: Vec<Cable>,
    /// The ethernet address of each, which it keeps.
    pub(crate) macs: Vec<[u8; 6]>,
    /// How to boot its disks anew, if that is known.
    pub(crate) boots: Option<Boots>,
    /// What it was started from, for people.
    pub(crate) source: Option<String>,
    /// Held while the machine's process is let go, so that whoever comes
    /// second finds it done.
    pub(crate) releasing: Mutex<()>,
    /// Serializes pause, capture, resume and stop.
    pub(crate) turn: Mutex<()>,
    pub(crate) state: Mutex<State>,
    pub(crate) descent: Mutex<Descent>,
    /// Layers that pages are being copied to.
    pub(crate) layers: Mutex<Vec<Weak<Pool>>>,
    pub(crate) live: Mutex<Option<Arc<Live>>>,
    /// The snapshot that it is while it has no process.
    pub(crate) rest: Mutex<Option<SnapshotId>>,
    /// The snapshot that it came back from, until the store has it as it is
    /// later: if it fails, that is what is left of it.
    pub(crate) came_from: Mutex<Option<SnapshotId>>,
    /// Nobody wants its disks any more.
    pub(crate) discarded: AtomicBool,
    /// Last counters, once it is detached from the page server.
    pub(crate) last_faults: Mutex<Option<MachineFaults>>,
    /// The generation that its agent has renewed to, and the wanted one.
    pub(crate) identity: Identity,
}

/// Which identity a machine's guest has and should have.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) wanted: AtomicU64,
    /// Held while a renewal is under way.
    pub(crate) renewed: Mutex<u64>,
    /// What `/etc/machine-id` says, which stays for the machine's life.
    pub(crate) machine_id: String,
}

impl Identity {
    /// One that the guest has not taken yet.
    pub(crate) fn new(wanted: u64, machine_id: String) -> Self {
        Self { wanted: AtomicU64::new(wanted), renewed: Mutex::new(0), machine_id }
    }
}

impl Machine {
    /// What it is doing now.
    pub(crate) fn state(&self) -> State {
        lock(&self.state).clone()
    }

    /// The snapshot that a machine without a process can come back from.
    pub(crate) fn left(&self) -> Option<SnapshotId> {
        let rest = *lock(&self.rest);
        rest.or_else(|| self.state().reason().and(*lock(&self.came_from)))
    }

    /// Its process, if it has one.
    pub(crate) fn live(&self) -> Option<Arc<Live>> {
        lock(&self.live).clone()
    }

    /// Records what it does now, unless it has ended.
    pub(crate) fn now(&self, what: State) {
        let mut state = lock(&self.state);
        if state.is_alive() {
            *state = what;
        }
    }

    /// Records that it needed a page that nobody has. Its process ended
    /// because of that, so this is the better reason.
    pub(crate) fn lost(&self, why: String) {
        let mut state = lock(&self.state);
        if !matches!(*state, State::Stopped(_) | State::Suspended) {
            *state = State::Failed(why);
        }
    }

    /// Waits until no page of it is to be copied any more: what was forked
    /// from it must not lose pages to its end. That does not depend on the
    /// guest.
    pub(crate) fn finish_layers(&self) {
        // Not taken out: others wait for the same before they end the process.
        let layers = lock(&self.layers).clone();
        for layer in layers.iter().filter_map(Weak::upgrade) {
            // What went wrong is told to those who need the layer.
            drop(layer.pager.wait_for_layer(layer.id));
        }
    }

    /// Records how it ended; the first reason stays.
    pub(crate) fn ended(&self, how: State) {
        self.now(how);
    }
}

/// Locks; a thread that panicked while it held the lock has not left anything
/// half done here, as every change is one assignment.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
