//! Going on where a page server that has ended left off.
//!
//! The supervisor kept everything that outlives it: the memory of each pool, the
//! record of each layer, each machine's userfaultfd. What the machines' threads
//! had asked is gone with the one that had heard it, so they are made to ask
//! again.
//!
//! Invariants: a machine's captures are open again before any fault of it is
//! answered, or a page could be unprotected that is not copied; pools are there
//! before the layers and machines over them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::capture;
use super::layer::LayerSource;
use super::pool::Pool;
use super::record::LayerRecord;
use super::server::{Answer, RequestError, Server, exactly, unknown};
use crate::protocol::{MachineKey, PageRun, PagerReply, PoolId, Region};
use crate::sys::pagemap::Pagemap;
use crate::sys::remote_memory::RemoteMemory;

impl Server {
    pub(super) fn adopt_pool(
        &mut self,
        id: PoolId,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, RequestError> {
        let [map, memory] = exactly(descriptors)?;
        let source = self.library.open(map.into())?;
        let pool = Pool::adopt(id, source, self.budget, memory)?;
        self.insert(id, pool)
    }

    pub(super) fn adopt_layer(
        &mut self,
        id: PoolId,
        len: u64,
        below: Vec<(PageRun, PoolId)>,
        (frozen, lost): (bool, Option<String>),
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, RequestError> {
        let [memory, record] = exactly(descriptors)?;
        let below = below
            .into_iter()
            .map(|(run, pool)| Ok((run, self.pool(pool)?)))
            .collect::<Result<Vec<_>, RequestError>>()?;
        let layer = LayerSource::adopt(len, below, LayerRecord::adopt(record), frozen)?;
        if let Some(reason) = lost {
            layer.lose(reason);
        }
        let pool = Pool::adopt_layer(id, Arc::new(layer), memory)?;
        self.insert(id, pool)
    }

    pub(super) fn adopt_machine(
        &self,
        key: MachineKey,
        regions: Vec<(PoolId, Region)>,
        memory: Option<(u64, u64)>,
        layers: &[PoolId],
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, RequestError> {
        let rest = descriptors.split_off(descriptors.len().min(1));
        let [userfault] = exactly(descriptors)?;
        let machine = Arc::new(self.new_machine(key, regions, userfault)?);
        let prepared = match memory {
            None => None,
            Some((address, len)) => {
                let [pagemap, remote] = exactly(rest)?;
                let range = address..address.saturating_add(len);
                Some(machine.prepare(range, Pagemap::new(pagemap), RemoteMemory::new(remote)))
            }
        };
        let pools: Result<Vec<_>, _> = layers.iter().map(|layer| self.pool(*layer)).collect();
        let captures = capture::take_up(&machine, &pools?, prepared);
        self.shared.attach(Arc::clone(&machine))?;
        machine.wake_all();
        capture::go_on(&machine, captures, &self.shared.outbox);
        Ok((PagerReply::Done, Vec::new()))
    }

    fn pool(&self, id: PoolId) -> Result<Arc<Pool>, RequestError> {
        self.pools.get(&id).cloned().ok_or_else(|| unknown(&id))
    }

    fn insert(&mut self, id: PoolId, pool: Pool) -> Result<Answer, RequestError> {
        if self.pools.contains_key(&id) {
            return Err(RequestError::Exists(format!("{id:?}")));
        }
        self.keep(id, pool);
        Ok((PagerReply::Done, Vec::new()))
    }
}
