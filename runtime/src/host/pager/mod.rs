//! The page server, as the supervisor sees it: a process that may end at any
//! moment, and is followed by another one then.
//!
//! Invariant: whoever asks gets an answer of one that knows all that earlier
//! ones were told, unless the page server was given up (`patience`).

mod journal;
mod layers;
mod lives;
mod patience;

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::Arc;

use super::peer::{News, PeerError};
use super::process::Program;
use crate::protocol::{
    MachineFaults, MachineKey, PageRun, PagerEvent, PagerReply, PagerRequest, PoolId, PoolStats,
    Region,
};

use journal::Layer;
use layers::Outcome;
use lives::{Lives, NAME};
pub use patience::Patience;

/// Packs named in one request.
const PACKS_AT_ONCE: usize = 1024;

/// Every pool and every attached machine with its counters. Those of faults and
/// reads count from the last takeover on.
pub type PagerStats = (Vec<(PoolId, PoolStats)>, Vec<(MachineKey, MachineFaults)>);

/// The handle of the page server. Dropping it kills the process.
#[derive(Debug)]
pub struct Pager {
    lives: Arc<Lives>,
}

impl Pager {
    /// Starts the process. `news` runs on a thread of its own and must not
    /// call back into the handle; [`News::Closed`] means that the page server
    /// was given up.
    pub fn spawn(
        program: &Program,
        log: &File,
        news: impl FnMut(News<PagerEvent>) + Send + 'static,
    ) -> Result<Self, PeerError> {
        Self::spawn_with(program, log, Patience::default(), news)
    }

    /// The same with another patience.
    pub fn spawn_with(
        program: &Program,
        log: &File,
        patience: Patience,
        news: impl FnMut(News<PagerEvent>) + Send + 'static,
    ) -> Result<Self, PeerError> {
        Ok(Self { lives: Lives::begin(program, log, patience, Box::new(news))? })
    }

    /// The process id of the present process.
    pub fn pid(&self) -> u32 {
        self.lives.pid()
    }

    /// How the last one ended that has ended.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.lives.last_end()
    }

    /// How often a new process has taken over from one that had ended.
    pub fn takeovers(&self) -> u64 {
        self.lives.takeovers()
    }

    /// Gives the page server a pack to read from.
    pub fn add_pack(&self, pack: u64, file: BorrowedFd<'_>) -> Result<(), PeerError> {
        let own = self.own(file)?;
        self.lives.ask(&PagerRequest::AddPack { pack }, &[file], |journal, reply, _| {
            journal.add_pack(pack, own);
            done(&reply)
        })
    }

    /// Makes an empty pool for an image and returns its memfd, read-only. The
    /// page map must not change any more.
    pub fn open_pool(&self, pool: PoolId, page_map: BorrowedFd<'_>) -> Result<OwnedFd, PeerError> {
        let own = self.own(page_map)?;
        let request = PagerRequest::OpenPool { pool };
        self.lives.ask(&request, &[page_map], |journal, reply, received| {
            let PagerReply::Pool = reply else { return None };
            let [memory, shared] = <[OwnedFd; 2]>::try_from(received).ok()?;
            journal.open_pool(pool, own, shared);
            Some(memory)
        })
    }

    /// Says where the pages of a pool's image lie since a collection.
    pub fn renew_pool(&self, pool: PoolId, page_map: BorrowedFd<'_>) -> Result<(), PeerError> {
        let own = self.own(page_map)?;
        self.lives.ask(&PagerRequest::RenewPool { pool }, &[page_map], |journal, reply, _| {
            journal.renew_pool(pool, own);
            done(&reply)
        })
    }

    /// Closes packs that no pool needs any more.
    pub fn forget_packs(&self, packs: &[u64]) -> Result<(), PeerError> {
        packs.chunks(PACKS_AT_ONCE).try_for_each(|packs| {
            let request = PagerRequest::ForgetPacks { packs: packs.to_vec() };
            self.lives.ask(&request, &[], |journal, reply, _| {
                journal.forget_packs(packs);
                done(&reply)
            })
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
        let [pagemap, remote] = descriptors;
        let own = [self.own(pagemap)?, self.own(remote)?];
        let (address, len) = (memory.start, memory.end.saturating_sub(memory.start));
        let request = PagerRequest::OpenLayer { layer, machine, address, len };
        self.lives.layers.opened(layer);
        let opened = self.lives.ask(&request, &descriptors, |journal, reply, received| {
            let PagerReply::Layer = reply else { return None };
            let [memfd, shared, record] = <[OwnedFd; 3]>::try_from(received).ok()?;
            let below = journal.memory_pools(machine);
            let noted = Layer { machine, len, record, below, frozen: false, freed: Vec::new() };
            journal.open_layer(layer, noted, shared, (memory.clone(), own));
            Some(memfd)
        });
        opened.inspect_err(|_| self.lives.layers.closed(layer))
    }

    /// Makes what the stopped machine has written belong to the layer; the
    /// machine may go on then. Returns how many pages that are.
    pub fn freeze(&self, layer: PoolId, pages_max: u64) -> Result<u64, PeerError> {
        let request = PagerRequest::Freeze { layer, pages_max };
        self.lives.ask(&request, &[], |journal, reply, _| {
            let PagerReply::Frozen { pages } = reply else { return None };
            journal.freeze(layer);
            Some(pages)
        })
    }

    /// Which pages a frozen layer has.
    pub fn layer_runs(&self, layer: PoolId) -> Result<Vec<PageRun>, PeerError> {
        self.lives.ask(&PagerRequest::LayerRuns { layer }, &[], |_, reply, _| match reply {
            PagerReply::Runs(runs) => Some(runs),
            _ => None,
        })
    }

    /// Says which pages of a frozen layer its machine has freed.
    pub fn clear_layer(&self, layer: PoolId, freed: Vec<PageRun>) -> Result<(), PeerError> {
        let request = PagerRequest::ClearLayer { layer, freed: freed.clone() };
        self.lives.ask(&request, &[], |journal, reply, _| {
            journal.clear_layer(layer, freed);
            done(&reply)
        })
    }

    /// Waits until a frozen layer needs its machine no more.
    pub fn wait_for_layer(&self, layer: PoolId) -> Result<(), PeerError> {
        let process = NAME.to_owned();
        match self.lives.layers.wait_for(layer) {
            Outcome::Whole => Ok(()),
            Outcome::Lost(reason) => Err(PeerError::Refused { process, reason }),
            Outcome::Gone => Err(PeerError::Gone { process }),
        }
    }

    /// Whether a pool or a layer is there: one that could not be taken over is
    /// lost.
    pub fn has_pool(&self, pool: PoolId) -> bool {
        self.lives.journal(|journal| journal.has_pool(pool))
    }

    /// Forgets a pool or a layer that no machine uses.
    pub fn close_pool(&self, pool: PoolId) -> Result<(), PeerError> {
        let closed = self.lives.ask(&PagerRequest::ClosePool { pool }, &[], |journal, reply, _| {
            journal.close_pool(pool);
            done(&reply)
        });
        match closed {
            Err(PeerError::Refused { .. }) if !self.has_pool(pool) => {}
            closed => closed?,
        }
        self.lives.layers.closed(pool);
        Ok(())
    }

    /// Serves a machine's faults from now on.
    pub fn attach(
        &self,
        machine: MachineKey,
        regions: Vec<(PoolId, Region)>,
        userfault: &Arc<OwnedFd>,
    ) -> Result<(), PeerError> {
        let request = PagerRequest::Attach { machine, regions: regions.clone() };
        self.lives.ask(&request, &[userfault.as_fd()], |journal, reply, _| {
            journal.attach(machine, regions, Arc::clone(userfault));
            done(&reply)
        })
    }

    /// The pages that a machine was the first to touch, in that order, since the
    /// last takeover.
    pub fn touched(&self, machine: MachineKey) -> Result<Vec<(PoolId, u64)>, PeerError> {
        self.lives.ask(&PagerRequest::Touched { machine }, &[], |_, reply, _| match reply {
            PagerReply::Touched(pages) => Some(pages),
            _ => None,
        })
    }

    /// Has pages fetched that a machine will touch; waits for none of them. What
    /// a page server that ends has not fetched is fetched when it is asked for.
    pub fn prefetch(
        &self,
        machine: MachineKey,
        pages: Vec<(PoolId, u64)>,
    ) -> Result<(), PeerError> {
        let request = PagerRequest::Prefetch { machine, pages };
        self.lives.ask(&request, &[], |_, reply, _| done(&reply))
    }

    /// Says how many bytes the pools may take together.
    pub fn set_budget(&self, bytes: u64) -> Result<(), PeerError> {
        self.lives.ask(&PagerRequest::Budget { bytes }, &[], |journal, reply, _| {
            journal.set_budget(bytes);
            done(&reply)
        })
    }

    /// Stops serving a machine and returns its last counters. If the page server
    /// refuses, it did not serve it.
    pub fn detach(&self, machine: MachineKey) -> Result<MachineFaults, PeerError> {
        let detached =
            self.lives.ask(&PagerRequest::Detach { machine }, &[], |journal, reply, _| {
                let PagerReply::Machine(faults) = reply else { return None };
                journal.detach(machine);
                Some(faults)
            });
        detached.inspect_err(|error| {
            if matches!(error, PeerError::Refused { .. }) {
                self.lives.journal(|journal| journal.detach(machine));
            }
        })
    }

    /// All counters.
    pub fn stats(&self) -> Result<PagerStats, PeerError> {
        self.lives.ask(&PagerRequest::Stats, &[], |_, reply, _| match reply {
            PagerReply::Stats { pools, machines } => Some((pools, machines)),
            _ => None,
        })
    }

    /// A descriptor to keep for the next one.
    fn own(&self, file: BorrowedFd<'_>) -> Result<OwnedFd, PeerError> {
        file.try_clone_to_owned().map_err(|source| PeerError::Channel {
            process: NAME.to_owned(),
            source: source.into(),
        })
    }
}

fn done(reply: &PagerReply) -> Option<()> {
    matches!(reply, PagerReply::Done).then_some(())
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.lives.end();
    }
}
