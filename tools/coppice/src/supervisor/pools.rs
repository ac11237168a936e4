//! Pools of the page server, one for each image that machines use.
//!
//! Machines that continue from the same image share its pool. A pool that no
//! machine uses stays open for a while, so that the next fork finds its pages
//! resident; the oldest idle ones are closed first.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use coppice_engine::{ImageRef, Store};
use coppice_runtime::host::{Pager, PeerError};
use coppice_runtime::protocol::{MachineKey, PoolId};

/// Idle pools kept open.
const IDLE_POOLS_MAX: usize = 16;

/// An open pool.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) id: PoolId,
    /// What it shows; `None` for a layer of a live machine.
    pub(crate) image: Option<ImageRef>,
    /// Its memfd, read-only.
    pub(crate) memory: OwnedFd,
    /// The page server that fills it.
    pub(crate) pager: Arc<Pager>,
    /// How many layers lie on each other here; none for an image.
    pub(crate) layers: usize,
    /// The pools that the page server fills a layer's gaps from. They must stay
    /// as long as the layer does, though no machine maps them.
    _below: Vec<Arc<Pool>>,
}

/// All open pools.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    open: Mutex<Open>,
}

/// What one page server has. With the next one it all begins again, but for
/// the ids: an old one must not name a new pool.
#[derive(Debug, Default)]
struct Open {
    pager: Option<Arc<Pager>>,
    pools: BTreeMap<PoolId, Arc<Pool>>,
    packs: BTreeSet<u64>,
    /// In which packs the pages of each image's pool lie.
    reads: BTreeMap<PoolId, BTreeSet<u64>>,
    next: u64,
}

impl Pools {
    /// The pool of an image, opened if it is not.
    pub(crate) fn get(
        &self,
        image: &ImageRef,
        store: &Store,
        pager: &Arc<Pager>,
    ) -> Result<Arc<Pool>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.belong_to(pager);
        if let Some(pool) = open.pools.values().find(|pool| pool.image == Some(*image)).cloned() {
            if pager.has_pool(pool.id) {
                return Ok(pool);
            }
            // It could not be taken over from a page server that ended.
            open.reads.remove(&pool.id);
            open.pools.remove(&pool.id);
        }
        open.close_idle();
        let pool = Arc::new(open.make(image, store, pager)?);
        open.pools.insert(pool.id, Arc::clone(&pool));
        Ok(pool)
    }

    /// An empty layer for the pages of a machine.
    pub(crate) fn open_layer(
        &self,
        pager: &Arc<Pager>,
        machine: MachineKey,
        memory: &Range<u64>,
        (below, descriptors): (&[Arc<Pool>], [BorrowedFd<'_>; 2]),
    ) -> Result<Arc<Pool>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.belong_to(pager);
        let id = open.next_id()?;
        let memory = pager.open_layer(id, machine, memory, descriptors)?;
        let layers = 1 + below.iter().map(|pool| pool.layers).max().unwrap_or(0);
        let (pager, below) = (Arc::clone(pager), below.to_vec());
        let layer = Arc::new(Pool { id, image: None, memory, pager, layers, _below: below });
        open.pools.insert(id, Arc::clone(&layer));
        Ok(layer)
    }

    /// Lets go what a collection has replaced, so that its space is free at
    /// once: idle pools that read it are closed, and the others read elsewhere.
    pub(crate) fn follow(&self, store: &Store) -> Result<()> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pager) = open.pager.clone() else { return Ok(()) };
        let kept: BTreeSet<u64> = store.packs()?.iter().map(|pack| pack.0).collect();
        let gone: BTreeSet<u64> = open.packs.difference(&kept).copied().collect();
        for pool in open.readers_of(&gone) {
            // Of an image that the store has no more, all stays as it is: who
            // uses the pool reads on from the packs that it knows.
            if (users(&pool) > 1 || open.close(&pool).is_err())
                && let Err(error) = open.renew(&pool, store)
            {
                tracing::warn!(pool = pool.id.0, %error, "it keeps packs that were collected");
            }
        }
        let read: BTreeSet<u64> = open.reads.values().flatten().copied().collect();
        let unread: Vec<u64> = gone.difference(&read).copied().collect();
        pager.forget_packs(&unread)?;
        open.packs.retain(|pack| !gone.contains(pack) || read.contains(pack));
        Ok(())
    }

    /// Gives back the layers that nobody uses any more.
    pub(crate) fn close_layers(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // One that is gone may have been the last user of those below it.
        while open.close_unused_layers() > 0 {}
    }

    /// Every open pool with the number of its users.
    pub(crate) fn list(&self) -> Vec<(Arc<Pool>, u64)> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = |pool: &Arc<Pool>| {
            let users = users(pool);
            (Arc::clone(pool), users)
        };
        open.pools.values().map(counted).collect()
    }
}

/// Users besides the table itself.
fn users(pool: &Arc<Pool>) -> u64 {
    u64::try_from(Arc::strong_count(pool)).unwrap_or(u64::MAX).saturating_sub(1)
}

impl Open {
    /// Forgets what another page server had: it is gone.
    fn belong_to(&mut self, pager: &Arc<Pager>) {
        if !self.pager.as_ref().is_some_and(|mine| Arc::ptr_eq(mine, pager)) {
            self.pools.clear();
            self.packs.clear();
            self.reads.clear();
            self.pager = Some(Arc::clone(pager));
        }
    }

    fn make(&mut self, image: &ImageRef, store: &Store, pager: &Arc<Pager>) -> Result<Pool> {
        let (table, packs) = self.page_map(image, store, pager)?;
        let id = self.next_id()?;
        let memory = pager.open_pool(id, table.as_fd())?;
        self.reads.insert(id, packs);
        let pager = Arc::clone(pager);
        Ok(Pool { id, image: Some(*image), memory, pager, layers: 0, _below: Vec::new() })
    }

    /// Where the pages of an image lie now: the map as a file, and the packs,
    /// which the page server has.
    fn page_map(
        &mut self,
        image: &ImageRef,
        store: &Store,
        pager: &Arc<Pager>,
    ) -> Result<(File, BTreeSet<u64>)> {
        let (map, packs) = store
            .page_map_with_packs(image, &|pack| self.packs.contains(&pack.0))
            .context("cannot locate the pages of an image")?;
        for (pack, file) in packs {
            pager.add_pack(pack.0, file.as_fd())?;
            self.packs.insert(pack.0);
        }
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut table = File::from(rustix::fs::memfd_create("coppice-page-map", flags)?);
        table.write_all(&map.to_bytes())?;
        Ok((table, map.packs().iter().map(|pack| pack.0).collect()))
    }

    /// Closes the layers that nobody uses; returns how many those were.
    fn close_unused_layers(&mut self) -> usize {
        let unused = |pool: &Arc<Pool>| pool.image.is_none() && users(pool) == 0;
        let unused: Vec<Arc<Pool>> =
            self.pools.values().filter(|pool| unused(pool)).cloned().collect();
        let before = self.pools.len();
        for layer in unused {
            match layer.pager.close_pool(layer.id) {
                Ok(()) | Err(PeerError::Gone { .. }) => drop(self.pools.remove(&layer.id)),
                // A machine that used it is not detached yet.
                Err(error) => tracing::debug!(layer = layer.id.0, %error, "kept"),
            }
        }
        before - self.pools.len()
    }

    /// The pools of images that have pages in these packs.
    fn readers_of(&self, packs: &BTreeSet<u64>) -> Vec<Arc<Pool>> {
        let reads = self.reads.iter().filter(|(_, read)| !read.is_disjoint(packs));
        reads.filter_map(|(id, _)| self.pools.get(id).cloned()).collect()
    }

    fn renew(&mut self, pool: &Pool, store: &Store) -> Result<()> {
        let Some(image) = pool.image else { return Ok(()) };
        let (table, packs) = self.page_map(&image, store, &pool.pager)?;
        pool.pager.renew_pool(pool.id, table.as_fd())?;
        self.reads.insert(pool.id, packs);
        Ok(())
    }

    fn close(&mut self, pool: &Pool) -> Result<(), PeerError> {
        pool.pager.close_pool(pool.id)?;
        self.reads.remove(&pool.id);
        self.pools.remove(&pool.id);
        Ok(())
    }

    fn next_id(&mut self) -> Result<PoolId> {
        let id = PoolId(self.next);
        self.next = self.next.checked_add(1).context("pool ids are used up")?;
        Ok(id)
    }

    fn close_idle(&mut self) {
        let idle = |pool: &Arc<Pool>| pool.image.is_some() && users(pool) == 0;
        let idle: Vec<Arc<Pool>> = self.pools.values().filter(|pool| idle(pool)).cloned().collect();
        let excess = idle.len().saturating_sub(IDLE_POOLS_MAX);
        for pool in idle.into_iter().take(excess) {
            if let Err(error) = self.close(&pool) {
                tracing::warn!(pool = pool.id.0, %error, "cannot close an idle pool");
            }
        }
    }
}
