//! What the supervisor asks of the page server.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::capture::{self, CaptureError};
use super::keeper::Keeper;
use super::layer::LayerSource;
use super::machine::{Machine, Mapped};
use super::outbox::Outbox;
use super::pool::{Budget, Pool, PoolError};
use super::prefetch::Prefetcher;
use super::source::{Library, SourceError};
use super::worker::{NUDGE, Shared};
use crate::protocol::{MachineKey, PAGE_SIZE, PagerReply, PagerRequest, PoolId, Region};
use crate::sys::pagemap::Pagemap;
use crate::sys::remote_memory::RemoteMemory;
use crate::sys::userfault::Userfault;

/// How the page server works.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Threads; all but one may be waiting for the store.
    pub workers: usize,
    /// Pages of the same frame that are installed with the one asked for.
    pub neighbours_max: u64,
    /// A hole is filled with zeros in aligned windows of this many pages.
    pub zero_window_pages: u64,
    /// How long a page stays at least, however small the budget is: long enough
    /// for whoever waited for it to get on.
    pub young: Duration,
    /// How often the budget is looked at.
    pub keeper_tick: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            workers: 8,
            neighbours_max: 31,
            zero_window_pages: 8,
            young: Duration::from_millis(500),
            keeper_tick: Duration::from_millis(50),
        }
    }
}

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    /// A name that must be new is not.
    #[error("{0} exists already")]
    Exists(String),
    /// A name that must exist does not.
    #[error("there is no {0}")]
    Unknown(String),
    /// A machine still maps the pool.
    #[error("{pool:?} is in use by {machine:?}; detach it first")]
    InUse {
        /// The pool.
        pool: PoolId,
        /// One of its machines.
        machine: MachineKey,
    },
    /// The request came with the wrong number of descriptors.
    #[error("the request needs {wanted} descriptors and came with {got}")]
    Descriptors {
        /// How many it needs.
        wanted: usize,
        /// How many it had.
        got: usize,
    },
    /// A mapping is not in whole pages, or reaches beyond its pool.
    #[error("the mapping of {len} bytes at {offset} does not lie in {pool:?}")]
    Region {
        /// The pool.
        pool: PoolId,
        /// Start in the image in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The image cannot be opened.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The pool cannot be made or trusted.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A machine cannot be captured.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The kernel refused a descriptor.
    #[error("the kernel refused a descriptor: {0}")]
    Descriptor(#[from] io::Error),
}

/// A reply and the descriptors that go with it.
pub(super) type Answer = (PagerReply, Vec<OwnedFd>);

/// Pools, machines and the threads that join them.
pub(super) struct Server {
    pub(super) library: Arc<dyn Library>,
    pub(super) budget: Budget,
    pub(super) pools: BTreeMap<PoolId, Arc<Pool>>,
    pub(super) shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    prefetcher: Prefetcher,
    keeper: Keeper,
}

impl Server {
    pub(super) fn start(
        library: Arc<dyn Library>,
        settings: &Settings,
        outbox: Outbox,
    ) -> io::Result<Self> {
        let workers = settings.workers.max(2);
        let shared = Arc::new(Shared::new(workers, outbox, Userfault::can_poison())?);
        let budget =
            Budget { neighbours: settings.neighbours_max, zero_window: settings.zero_window_pages };
        let keeper = Keeper::start(settings.young, settings.keeper_tick)?;
        let prefetcher = Prefetcher::start(&shared, keeper.keeping())?;
        let (pools, threads) = (BTreeMap::new(), Vec::new());
        let mut server =
            Self { library, budget, pools, shared, workers: threads, prefetcher, keeper };
        for number in 0..workers {
            let shared = Arc::clone(&server.shared);
            let thread = std::thread::Builder::new().name(format!("fault-{number}"));
            server.workers.push(thread.spawn(move || shared.run())?);
        }
        Ok(server)
    }

    /// Does what a request says.
    pub(super) fn handle(
        &mut self,
        request: PagerRequest,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, RequestError> {
        match request {
            PagerRequest::AddPack { pack } => {
                self.library.add_pack(pack, File::from(one(descriptors)?));
                Ok((PagerReply::Done, Vec::new()))
            }
            PagerRequest::OpenPool { pool } => self.open_pool(pool, one(descriptors)?),
            PagerRequest::RenewPool { pool } => {
                let pool = self.pools.get(&pool).ok_or_else(|| unknown(&pool))?;
                pool.renew(File::from(one(descriptors)?))?;
                Ok((PagerReply::Done, Vec::new()))
            }
            PagerRequest::ForgetPacks { packs } => {
                self.library.forget_packs(&packs);
                Ok((PagerReply::Done, Vec::new()))
            }
            PagerRequest::ClosePool { pool } => self.close_pool(pool),
            PagerRequest::Attach { machine, regions } => {
                self.attach(machine, regions, one(descriptors)?)
            }
            PagerRequest::OpenLayer { layer, machine, address, len } => {
                self.open_layer(layer, machine, address..address.saturating_add(len), descriptors)
            }
            PagerRequest::Freeze { layer, pages_max } => {
                let pages = capture::freeze(self.layer(layer)?, pages_max, &self.shared.outbox)?;
                Ok((PagerReply::Frozen { pages }, Vec::new()))
            }
            PagerRequest::ClearLayer { layer, freed } => {
                self.layer(layer)?.layer().ok_or_else(|| unknown(&layer))?.clear(&freed);
                Ok((PagerReply::Done, Vec::new()))
            }
            PagerRequest::LayerRuns { layer } => {
                let source = self.layer(layer)?.layer().ok_or_else(|| unknown(&layer))?;
                Ok((PagerReply::Runs(source.runs().to_vec()), Vec::new()))
            }
            PagerRequest::Touched { machine } => {
                let touched = self.machine(machine)?.touched.pages();
                Ok((PagerReply::Touched(touched), Vec::new()))
            }
            PagerRequest::Prefetch { machine, pages } => {
                self.prefetcher.begin(self.machine(machine)?, pages);
                Ok((PagerReply::Done, Vec::new()))
            }
            PagerRequest::Budget { bytes } => {
                self.keeper.keeping().set_budget(bytes);
                Ok((PagerReply::Done, Vec::new()))
            }
            PagerRequest::Detach { machine } => {
                let gone = self.shared.detach(machine).ok_or_else(|| unknown(&machine))?;
                Ok((PagerReply::Machine(gone.counters()), Vec::new()))
            }
            PagerRequest::Stats => self.stats(),
            PagerRequest::AdoptPool { pool } => self.adopt_pool(pool, descriptors),
            PagerRequest::AdoptLayer { layer, len, below, frozen, lost } => {
                self.adopt_layer(layer, len, below, (frozen, lost), descriptors)
            }
            PagerRequest::AdoptMachine { machine, regions, memory, layers } => {
                self.adopt_machine(machine, regions, memory, &layers, descriptors)
            }
        }
    }

    fn open_pool(&mut self, id: PoolId, map: OwnedFd) -> Result<Answer, RequestError> {
        if self.pools.contains_key(&id) {
            return Err(RequestError::Exists(format!("{id:?}")));
        }
        let source = self.library.open(File::from(map))?;
        let pool = Pool::new(id, source, self.budget)?;
        let memory = vec![pool.read_only()?, pool.share()?];
        self.keep(id, pool);
        Ok((PagerReply::Pool, memory))
    }

    fn open_layer(
        &mut self,
        id: PoolId,
        key: MachineKey,
        memory: Range<u64>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, RequestError> {
        if self.pools.contains_key(&id) {
            return Err(RequestError::Exists(format!("{id:?}")));
        }
        let [pagemap, remote] = exactly(descriptors)?;
        let machine = self.machine(key)?;
        let (pagemap, remote) = (Pagemap::new(pagemap), RemoteMemory::new(remote));
        machine.prepare(memory.clone(), pagemap, remote)?;
        let source = Arc::new(LayerSource::of(&machine, memory)?);
        let pool = Pool::of_layer(id, Arc::clone(&source))?;
        let files = vec![pool.read_only()?, pool.share()?, source.record().share()?];
        self.keep(id, pool);
        Ok((PagerReply::Layer, files))
    }

    /// Takes a pool among those that are known.
    pub(super) fn keep(&mut self, id: PoolId, pool: Pool) {
        let pool = Arc::new(pool);
        self.keeper.keeping().watch(&pool);
        self.pools.insert(id, pool);
    }

    fn machine(&self, key: MachineKey) -> Result<Arc<Machine>, RequestError> {
        let machines = self.shared.machines.read().unwrap_or_else(PoisonError::into_inner);
        machines.get(&key).cloned().ok_or_else(|| unknown(&key))
    }

    fn layer(&self, id: PoolId) -> Result<&Arc<Pool>, RequestError> {
        self.pools.get(&id).filter(|pool| pool.layer().is_some()).ok_or_else(|| unknown(&id))
    }

    fn close_pool(&mut self, id: PoolId) -> Result<Answer, RequestError> {
        let pool = self.pools.get(&id).ok_or_else(|| unknown(&id))?;
        let machines = self.shared.machines.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(user) = machines.values().find(|machine| machine.uses(pool)) {
            return Err(RequestError::InUse { pool: id, machine: user.key });
        }
        drop(machines);
        self.pools.remove(&id);
        Ok((PagerReply::Done, Vec::new()))
    }

    fn attach(
        &self,
        key: MachineKey,
        regions: Vec<(PoolId, Region)>,
        userfault: OwnedFd,
    ) -> Result<Answer, RequestError> {
        let machine = Arc::new(self.new_machine(key, regions, userfault)?);
        self.shared.attach(Arc::clone(&machine))?;
        // A page server that ended may have heard it, and answered nobody.
        machine.wake_all();
        Ok((PagerReply::Done, Vec::new()))
    }

    /// A machine that is not served yet.
    pub(super) fn new_machine(
        &self,
        key: MachineKey,
        regions: Vec<(PoolId, Region)>,
        userfault: OwnedFd,
    ) -> Result<Machine, RequestError> {
        let known = self.shared.machines.read().unwrap_or_else(PoisonError::into_inner);
        if key.0 == NUDGE || known.contains_key(&key) {
            return Err(RequestError::Exists(format!("{key:?}")));
        }
        drop(known);
        let mapped: Result<Vec<_>, _> =
            regions.into_iter().map(|(pool, region)| self.mapped(pool, region)).collect();
        Ok(Machine::new(key, Userfault::adopt(userfault)?, mapped?))
    }

    fn mapped(&self, id: PoolId, region: Region) -> Result<Mapped, RequestError> {
        let pool = self.pools.get(&id).ok_or_else(|| unknown(&id))?;
        let Region { address, offset, len, .. } = region;
        let whole = [address, offset, len].iter().all(|n| n.is_multiple_of(PAGE_SIZE));
        let in_pool = offset.checked_add(len).is_some_and(|end| end <= pool.pages() * PAGE_SIZE);
        if whole && in_pool && address.checked_add(len).is_some() {
            Ok(Mapped { pool: Arc::clone(pool), region })
        } else {
            Err(RequestError::Region { pool: id, offset, len })
        }
    }

    fn stats(&self) -> Result<Answer, RequestError> {
        let pools: Result<Vec<_>, PoolError> =
            self.pools.iter().map(|(id, pool)| Ok((*id, pool.stats()?))).collect();
        let known = self.shared.machines.read().unwrap_or_else(PoisonError::into_inner);
        let mut machines: Vec<_> =
            known.iter().map(|(key, machine)| (*key, machine.counters())).collect();
        machines.sort_unstable_by_key(|(key, _)| *key);
        Ok((PagerReply::Stats { pools: pools?, machines }, Vec::new()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop();
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so already.
            drop(worker.join());
        }
        self.prefetcher.end();
    }
}

fn one(descriptors: Vec<OwnedFd>) -> Result<OwnedFd, RequestError> {
    exactly(descriptors).map(|[only]| only)
}

/// The descriptors of a request that comes with this many.
pub(super) fn exactly<const N: usize>(
    descriptors: Vec<OwnedFd>,
) -> Result<[OwnedFd; N], RequestError> {
    let got = descriptors.len();
    descriptors.try_into().map_err(|_| RequestError::Descriptors { wanted: N, got })
}

pub(super) fn unknown(name: &dyn std::fmt::Debug) -> RequestError {
    RequestError::Unknown(format!("{name:?}"))
}
