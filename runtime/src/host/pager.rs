//! The page server's process, as the supervisor sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::peer::{News, Peer, PeerError};
use super::process::Program;
use crate::protocol::{
    MachineFaults, MachineKey, PageRun, PagerEvent, PagerMessage, PagerReply, PagerRequest, PoolId,
    PoolStats, Region,
};

/// Packs named in one request.
const PACKS_AT_ONCE: usize = 1024;

/// How long a process whose channel is closed may take to end, and how often to
/// look.
const EXIT_LIMIT: Duration = Duration::from_secs(1);
const EXIT_RETRY: Duration = Duration::from_millis(5);

/// Every pool and every attached machine with its counters.
pub type PagerStats = (Vec<(PoolId, PoolStats)>, Vec<(MachineKey, MachineFaults)>);

/// The handle of the page server. Dropping it kills the process.
#[derive(Debug)]
pub struct Pager {
    peer: Peer<PagerRequest, PagerMessage>,
    layers: Arc<Layers>,
    child: Mutex<Child>,
    pid: u32,
}

impl Pager {
    /// Starts the process. `news` runs on a thread of its own and must not
    /// call back into the handle.
    pub fn spawn(
        program: &Program,
        log: &File,
        news: impl FnMut(News<PagerEvent>) + Send + 'static,
    ) -> Result<Self, PeerError> {
        let process = "the page server".to_owned();
        let (child, channel) = program.start(&process, log)?;
        let pid = child.id();
        let layers = Arc::new(Layers::default());
        let peer = Peer::new(process, channel, sorted(Arc::clone(&layers), news))?;
        // It lists the pages of a machine of any size.
        peer.expect_bodies(usize::MAX);
        Ok(Self { peer, layers, child: Mutex::new(child), pid })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How the process ended whose channel has closed; `None` if it is there all
    /// the same.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        let begun = Instant::now();
        loop {
            let ended = self.child().try_wait();
            match ended {
                Ok(Some(status)) => return Some(status),
                Ok(None) if begun.elapsed() < EXIT_LIMIT => std::thread::sleep(EXIT_RETRY),
                _ => return None,
            }
        }
    }

    /// Gives the page server a pack to read from.
    pub fn add_pack(&self, pack: u64, file: BorrowedFd<'_>) -> Result<(), PeerError> {
        self.done(&PagerRequest::AddPack { pack }, &[file])
    }

    /// Makes an empty pool for an image and returns its memfd, read-only.
    pub fn open_pool(&self, pool: PoolId, page_map: BorrowedFd<'_>) -> Result<OwnedFd, PeerError> {
        let (reply, mut received) =
            self.peer.call(&PagerRequest::OpenPool { pool }, &[page_map])?;
        match (reply, received.pop()) {
            (PagerReply::Pool, Some(memory)) => Ok(memory),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Says where the pages of a pool's image lie since a collection.
    pub fn renew_pool(&self, pool: PoolId, page_map: BorrowedFd<'_>) -> Result<(), PeerError> {
        self.done(&PagerRequest::RenewPool { pool }, &[page_map])
    }

    /// Closes packs that no pool needs any more.
    pub fn forget_packs(&self, packs: &[u64]) -> Result<(), PeerError> {
        packs.chunks(PACKS_AT_ONCE).try_for_each(|packs| {
            self.done(&PagerRequest::ForgetPacks { packs: packs.to_vec() }, &[])
        })
    }

    /// Makes an empty layer for a machine's pages and returns its memfd,
    /// read-only. `memory` is where the machine's memory lies in its process.
    pub fn open_layer(
        &self,
        layer: PoolId,
        machine: MachineKey,
        memory: &Range<u64>,
        descriptors: [BorrowedFd<'_>; 2],
    ) -> Result<OwnedFd, PeerError> {
        let (address, len) = (memory.start, memory.end.saturating_sub(memory.start));
        let request = PagerRequest::OpenLayer { layer, machine, address, len };
        self.layers.lock().open.insert(layer);
        let (reply, mut received) = self.peer.call(&request, &descriptors)?;
        match (reply, received.pop()) {
            (PagerReply::Pool, Some(memory)) => Ok(memory),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Makes what the stopped machine has written belong to the layer; the
    /// machine may go on then. Returns how many pages that are.
    pub fn freeze(&self, layer: PoolId, pages_max: u64) -> Result<u64, PeerError> {
        match self.peer.call(&PagerRequest::Freeze { layer, pages_max }, &[])?.0 {
            PagerReply::Frozen { pages } => Ok(pages),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Says which pages of a frozen layer its machine has freed.
    pub fn clear_layer(&self, layer: PoolId, freed: Vec<PageRun>) -> Result<(), PeerError> {
        self.done(&PagerRequest::ClearLayer { layer, freed }, &[])
    }

    /// Which pages a frozen layer has.
    pub fn layer_runs(&self, layer: PoolId) -> Result<Vec<PageRun>, PeerError> {
        match self.peer.call(&PagerRequest::LayerRuns { layer }, &[])?.0 {
            PagerReply::Runs(runs) => Ok(runs),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Waits until a frozen layer needs its machine no more.
    pub fn wait_for_layer(&self, layer: PoolId) -> Result<(), PeerError> {
        let mut done = self.layers.lock();
        loop {
            match done.layers.get(&layer) {
                Some(None) => return Ok(()),
                Some(Some(reason)) => return Err(self.peer.refused(reason.clone())),
                None if done.closed => return Err(self.peer.gone()),
                // It was closed: who needed it has had it.
                None if !done.open.contains(&layer) => return Ok(()),
                None => done = self.layers.wait(done),
            }
        }
    }

    /// Forgets a pool or a layer that no machine uses.
    pub fn close_pool(&self, pool: PoolId) -> Result<(), PeerError> {
        self.done(&PagerRequest::ClosePool { pool }, &[])?;
        let mut done = self.layers.lock();
        done.layers.remove(&pool);
        if done.open.remove(&pool) {
            self.layers.changed.notify_all();
        }
        Ok(())
    }

    /// Serves a machine's faults from now on.
    pub fn attach(
        &self,
        machine: MachineKey,
        regions: Vec<(PoolId, Region)>,
        userfault: &OwnedFd,
    ) -> Result<(), PeerError> {
        self.done(&PagerRequest::Attach { machine, regions }, &[userfault.as_fd()])
    }

    /// The pages that a machine was the first to touch, in that order.
    pub fn touched(&self, machine: MachineKey) -> Result<Vec<(PoolId, u64)>, PeerError> {
        match self.peer.call(&PagerRequest::Touched { machine }, &[])?.0 {
            PagerReply::Touched(pages) => Ok(pages),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Has pages fetched that a machine will touch; waits for none of them.
    pub fn prefetch(
        &self,
        machine: MachineKey,
        pages: Vec<(PoolId, u64)>,
    ) -> Result<(), PeerError> {
        self.done(&PagerRequest::Prefetch { machine, pages }, &[])
    }

    /// Says how many bytes the pools may take together.
    pub fn set_budget(&self, bytes: u64) -> Result<(), PeerError> {
        self.done(&PagerRequest::Budget { bytes }, &[])
    }

    /// Stops serving a machine and returns its last counters.
    pub fn detach(&self, machine: MachineKey) -> Result<MachineFaults, PeerError> {
        match self.peer.call(&PagerRequest::Detach { machine }, &[])?.0 {
            PagerReply::Machine(faults) => Ok(faults),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// All counters.
    pub fn stats(&self) -> Result<PagerStats, PeerError> {
        match self.peer.call(&PagerRequest::Stats, &[])?.0 {
            PagerReply::Stats { pools, machines } => Ok((pools, machines)),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn done(
        &self,
        request: &PagerRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), PeerError> {
        match self.peer.call(request, descriptors)?.0 {
            PagerReply::Done => Ok(()),
            _ => Err(self.peer.out_of_turn()),
        }
    }
}

/// The layers that are done, each with the reason if pages are lost.
#[derive(Debug, Default)]
struct Layers {
    done: Mutex<Done>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Done {
    layers: BTreeMap<PoolId, Option<String>>,
    /// Layers that are not closed.
    open: BTreeSet<PoolId>,
    /// No more news will come.
    closed: bool,
}

impl Layers {
    fn lock(&self) -> MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, done: MutexGuard<'a, Done>) -> MutexGuard<'a, Done> {
        self.changed.wait(done).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps news of layers here, and passes on the rest.
fn sorted(
    layers: Arc<Layers>,
    mut news: impl FnMut(News<PagerEvent>),
) -> impl FnMut(News<PagerEvent>) {
    move |event| {
        match &event {
            News::Event(PagerEvent::LayerDone { layer, error }) => {
                layers.lock().layers.insert(*layer, error.clone());
                layers.changed.notify_all();
                return;
            }
            News::Event(_) => {}
            News::Closed => {
                layers.lock().closed = true;
                layers.changed.notify_all();
            }
        }
        news(event);
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let mut child = self.child();
        // Fails only if it has been waited for already, which is the goal.
        drop(child.kill());
        drop(child.wait());
    }
}
