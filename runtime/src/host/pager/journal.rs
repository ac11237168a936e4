//! What the page server was told and gave, for the one that takes over.
//!
//! Invariant: an entry is made or removed in one step with seeing the answer
//! (the caller holds the lock over both), so whoever replays it knows what was
//! answered and nothing that was not. A request whose answer was not seen is
//! made again, and each of them can be.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::super::peer::PeerError;
use super::layers::Layers;
use crate::protocol::{Content, MachineKey, PAGE_SIZE, PageRun, PagerRequest, PoolId, Region};

/// Everything that outlives a page server.
#[derive(Debug, Default)]
pub(super) struct Journal {
    packs: BTreeMap<u64, OwnedFd>,
    /// In the order in which they were made: a layer lies over earlier ones.
    pools: Vec<(PoolId, Pool)>,
    machines: BTreeMap<MachineKey, Machine>,
    /// What the pools may take together, if that was ever said.
    budget_bytes: Option<u64>,
}

#[derive(Debug)]
struct Pool {
    memory: OwnedFd,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Image { map: OwnedFd },
    Layer(Layer),
}

/// A layer of a machine.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) machine: MachineKey,
    /// Of the machine's memory, in bytes.
    pub(super) len: u64,
    pub(super) record: OwnedFd,
    pub(super) below: Vec<(PageRun, PoolId)>,
    pub(super) frozen: bool,
    /// Pages that its machine had freed.
    pub(super) freed: Vec<PageRun>,
}

#[derive(Debug)]
struct Machine {
    userfault: Arc<OwnedFd>,
    regions: Vec<(PoolId, Region)>,
    /// Once it was prepared for being frozen.
    memory: Option<Memory>,
}

#[derive(Debug)]
struct Memory {
    range: Range<u64>,
    /// Its pagemap and its memory.
    descriptors: [OwnedFd; 2],
}

/// How much there is to take over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Inventory {
    pub(super) pools: usize,
    pub(super) machines: usize,
    /// Captures whose pages were not all copied.
    pub(super) captures: usize,
    /// Machines that the new page server refused.
    pub(super) refused: usize,
    /// Pools and layers that it refused.
    pub(super) pools_lost: usize,
}

/// Asks the new page server.
pub(super) type Ask<'a> = dyn FnMut(&PagerRequest, &[BorrowedFd<'_>]) -> Result<(), PeerError> + 'a;

impl Journal {
    pub(super) fn add_pack(&mut self, pack: u64, file: OwnedFd) {
        self.packs.entry(pack).or_insert(file);
    }

    pub(super) fn forget_packs(&mut self, packs: &[u64]) {
        packs.iter().for_each(|pack| drop(self.packs.remove(pack)));
    }

    pub(super) fn open_pool(&mut self, id: PoolId, map: OwnedFd, memory: OwnedFd) {
        self.pools.push((id, Pool { memory, kind: Kind::Image { map } }));
    }

    pub(super) fn renew_pool(&mut self, id: PoolId, renewed: OwnedFd) {
        if let Some(Pool { kind: Kind::Image { map }, .. }) = self.pool(id) {
            *map = renewed;
        }
    }

    /// Notes a layer, and that its machine is prepared for being frozen.
    pub(super) fn open_layer(
        &mut self,
        id: PoolId,
        layer: Layer,
        memory: OwnedFd,
        (range, descriptors): (Range<u64>, [OwnedFd; 2]),
    ) {
        if let Some(machine) = self.machines.get_mut(&layer.machine) {
            machine.memory.get_or_insert(Memory { range, descriptors });
        }
        self.pools.push((id, Pool { memory, kind: Kind::Layer(layer) }));
    }

    pub(super) fn freeze(&mut self, id: PoolId) {
        if let Some(Pool { kind: Kind::Layer(layer), .. }) = self.pool(id) {
            layer.frozen = true;
        }
    }

    pub(super) fn clear_layer(&mut self, id: PoolId, freed: Vec<PageRun>) {
        if let Some(Pool { kind: Kind::Layer(layer), .. }) = self.pool(id) {
            layer.freed = freed;
        }
    }

    pub(super) fn close_pool(&mut self, id: PoolId) {
        self.pools.retain(|(known, _)| *known != id);
    }

    pub(super) fn set_budget(&mut self, bytes: u64) {
        self.budget_bytes = Some(bytes);
    }

    pub(super) fn attach(
        &mut self,
        key: MachineKey,
        regions: Vec<(PoolId, Region)>,
        userfault: Arc<OwnedFd>,
    ) {
        self.machines.insert(key, Machine { userfault, regions, memory: None });
    }

    pub(super) fn detach(&mut self, key: MachineKey) {
        self.machines.remove(&key);
    }

    pub(super) fn has_pool(&self, id: PoolId) -> bool {
        self.pools.iter().any(|(known, _)| *known == id)
    }

    /// Which pool shows which pages of a machine's memory.
    pub(super) fn memory_pools(&self, key: MachineKey) -> Vec<(PageRun, PoolId)> {
        let regions = self.machines.get(&key).map(|machine| machine.regions.as_slice());
        let memory = regions.unwrap_or_default().iter();
        let memory = memory.filter(|(_, region)| region.content == Content::Memory);
        let run = |region: &Region| PageRun {
            first: region.offset / PAGE_SIZE,
            count: region.len / PAGE_SIZE,
        };
        let mut pools: Vec<_> = memory.map(|(pool, region)| (run(region), *pool)).collect();
        pools.sort_by_key(|(run, _)| run.first);
        pools
    }

    fn pool(&mut self, id: PoolId) -> Option<&mut Pool> {
        self.pools.iter_mut().find(|(known, _)| *known == id).map(|(_, pool)| pool)
    }

    /// Tells a new page server everything. `lost` hears of machines that it
    /// refuses. A pool that it refuses is forgotten, and costs the machines that
    /// use it, which it refuses then; nothing else may be refused.
    pub(super) fn replay(
        &mut self,
        layers: &Layers,
        ask: &mut Ask<'_>,
        lost: &mut dyn FnMut(MachineKey, PoolId, String),
    ) -> Result<Inventory, PeerError> {
        if let Some(bytes) = self.budget_bytes {
            ask(&PagerRequest::Budget { bytes }, &[])?;
        }
        for (pack, file) in &self.packs {
            ask(&PagerRequest::AddPack { pack: *pack }, &[file.as_fd()])?;
        }
        let pools_lost = self.replay_pools(layers, ask)?;
        let pools = self.pools.len();
        let mut inventory = Inventory { pools, pools_lost, ..Inventory::default() };
        for (key, machine) in &self.machines {
            let unfinished = self.unfinished(*key, layers);
            inventory.captures += unfinished.len();
            match machine.replay(*key, unfinished.clone(), ask) {
                Ok(()) => inventory.machines += 1,
                Err(PeerError::Refused { reason, .. }) => {
                    inventory.refused += 1;
                    // Whoever stops it waits for them.
                    unfinished.iter().for_each(|id| layers.done(*id, Some(reason.clone())));
                    let pool = machine.regions.first().map_or(PoolId(0), |(pool, _)| *pool);
                    lost(*key, pool, reason);
                }
                Err(error) => return Err(error),
            }
        }
        self.finish_orphans(layers);
        // Also where there was nothing to tell, it has shown that it answers.
        ask(&PagerRequest::ForgetPacks { packs: Vec::new() }, &[])?;
        Ok(inventory)
    }

    /// Returns how many were refused.
    fn replay_pools(&mut self, layers: &Layers, ask: &mut Ask<'_>) -> Result<usize, PeerError> {
        let mut refused = Vec::new();
        for (id, pool) in &self.pools {
            match pool.replay(*id, layers, ask) {
                Ok(()) => {}
                Err(PeerError::Refused { reason, .. }) => {
                    tracing::warn!(pool = id.0, reason, "lost with a page server");
                    layers.done(*id, Some(reason));
                    refused.push(*id);
                }
                Err(error) => return Err(error),
            }
        }
        self.pools.retain(|(id, _)| !refused.contains(id));
        Ok(refused.len())
    }

    /// The layers to which pages of a machine are still to be copied, or may be
    /// once they are frozen.
    fn unfinished(&self, key: MachineKey, layers: &Layers) -> Vec<PoolId> {
        self.layers()
            .filter(|(id, layer)| layer.machine == key && layer.outcome(*id, layers).is_none())
            .map(|(id, _)| id)
            .collect()
    }

    /// Nobody waits for a layer of a machine that is detached already.
    fn finish_orphans(&self, layers: &Layers) {
        for (id, layer) in self.layers() {
            let orphan = !self.machines.contains_key(&layer.machine);
            if orphan && layer.frozen && layers.outcome(id).is_none() {
                layers.done(id, Some("its machine ended before it was copied".to_owned()));
            }
        }
    }

    fn layers(&self) -> impl Iterator<Item = (PoolId, &Layer)> {
        self.pools.iter().filter_map(|(id, pool)| match &pool.kind {
            Kind::Layer(layer) => Some((*id, layer)),
            Kind::Image { .. } => None,
        })
    }
}

impl Layer {
    /// What became of it. Nothing yet if nobody has seen that it was frozen.
    fn outcome(&self, id: PoolId, layers: &Layers) -> Option<Option<String>> {
        layers.outcome(id).filter(|_| self.frozen)
    }
}

impl Pool {
    fn replay(&self, id: PoolId, layers: &Layers, ask: &mut Ask<'_>) -> Result<(), PeerError> {
        let memory = self.memory.as_fd();
        match &self.kind {
            Kind::Image { map } => {
                ask(&PagerRequest::AdoptPool { pool: id }, &[map.as_fd(), memory])
            }
            Kind::Layer(layer) => {
                if !layer.frozen {
                    layers.begin_again(id);
                }
                let request = PagerRequest::AdoptLayer {
                    layer: id,
                    len: layer.len,
                    below: layer.below.clone(),
                    frozen: layer.frozen,
                    lost: layer.outcome(id, layers).flatten(),
                };
                ask(&request, &[memory, layer.record.as_fd()])?;
                if layer.freed.is_empty() {
                    return Ok(());
                }
                ask(&PagerRequest::ClearLayer { layer: id, freed: layer.freed.clone() }, &[])
            }
        }
    }
}

impl Machine {
    fn replay(
        &self,
        key: MachineKey,
        layers: Vec<PoolId>,
        ask: &mut Ask<'_>,
    ) -> Result<(), PeerError> {
        let mut descriptors = vec![self.userfault.as_fd()];
        let mut memory = None;
        if let Some(Memory { range, descriptors: files }) = &self.memory {
            memory = Some((range.start, range.end - range.start));
            descriptors.extend(files.iter().map(AsFd::as_fd));
        }
        let regions = self.regions.clone();
        ask(&PagerRequest::AdoptMachine { machine: key, regions, memory, layers }, &descriptors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    fn with_layer(id: PoolId, key: MachineKey, frozen: bool) -> Journal {
        let mut journal = Journal::default();
        journal.attach(key, Vec::new(), Arc::new(file()));
        let (below, freed) = (Vec::new(), Vec::new());
        let layer = Layer { machine: key, len: 4096, record: file(), below, frozen, freed };
        journal.open_layer(id, layer, file(), (0..4096, [file(), file()]));
        journal
    }

    /// The copier may end before it is seen that the layer is frozen.
    #[test]
    fn what_was_said_of_a_layer_counts_once_it_is_frozen() {
        let (id, key) = (PoolId(1), MachineKey(7));
        for frozen in [false, true] {
            let (mut journal, layers) = (with_layer(id, key, frozen), Layers::default());
            layers.opened(id);
            layers.done(id, Some("lost".to_owned()));
            let mut asked = Vec::new();
            let mut ask = |request: &PagerRequest, _: &[BorrowedFd<'_>]| {
                asked.push(request.clone());
                Ok(())
            };
            let replayed = journal.replay(&layers, &mut ask, &mut |_, _, _| panic!("refused"));
            assert_eq!(replayed.unwrap().captures, usize::from(!frozen));
            assert_eq!(layers.outcome(id).is_some(), frozen);
            let [adopted, machine, _] = &asked[..] else { panic!("{asked:?}") };
            let known = frozen.then(|| "lost".to_owned());
            assert!(matches!(adopted, PagerRequest::AdoptLayer { lost, .. } if *lost == known));
            assert!(matches!(machine, PagerRequest::AdoptMachine { layers, .. }
                if layers.is_empty() == frozen));
        }
    }
}
