//! Which pools show a machine's memory.

use std::sync::Arc;

use anyhow::Result;
use coppice_runtime::pieces::{PIECES_MAX, Piece, with_layer};
use coppice_runtime::protocol::PageRun;

use super::pools::Pool;

/// Pieces of pools, in order and without gaps. Each pool is held once, so that
/// its users are its machines. Empty for a machine that booted.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryMap {
    /// With the place of the pool among the pools.
    pieces: Vec<Piece<u32>>,
    pools: Vec<Arc<Pool>>,
}

impl MemoryMap {
    /// One pool that shows everything.
    pub(crate) fn whole(pages: u64, pool: Arc<Pool>) -> Self {
        Self { pieces: Piece::whole(pages, 0), pools: vec![pool] }
    }

    /// The same with a layer on top, which has the `written` pages.
    pub(crate) fn with_layer(
        &self,
        written: &[PageRun],
        layer: &Arc<Pool>,
        pages: u64,
    ) -> Result<Self> {
        let number = u32::try_from(self.pools.len())?;
        let mut pieces = with_layer(&self.pieces, written, &number, pages, PIECES_MAX);
        let mut all: Vec<Arc<Pool>> = self.pools.clone();
        all.push(Arc::clone(layer));
        // A pool of which nothing is left to see is let go.
        let mut pools = Vec::new();
        let mut numbers: Vec<Option<u32>> = vec![None; all.len()];
        for piece in &mut pieces {
            let old = usize::try_from(piece.pool)?;
            piece.pool = match numbers[old] {
                Some(number) => number,
                None => {
                    let number = u32::try_from(pools.len())?;
                    pools.push(Arc::clone(&all[old]));
                    *numbers[old].insert(number)
                }
            };
        }
        Ok(Self { pieces, pools })
    }

    /// The pieces, by the places of their pools.
    pub(crate) fn pieces(&self) -> &[Piece<u32>] {
        &self.pieces
    }

    /// The pools.
    pub(crate) fn pools(&self) -> &[Arc<Pool>] {
        &self.pools
    }

    /// The pool of the piece that begins at a page.
    pub(crate) fn pool_at(&self, first: u64) -> Option<&Arc<Pool>> {
        let at = self.pieces.binary_search_by_key(&first, |piece| piece.run.first).ok()?;
        self.pools.get(usize::try_from(self.pieces[at].pool).ok()?)
    }

    /// How many layers of live machines lie on each other, also where none of
    /// those below is to be seen.
    pub(crate) fn layers(&self) -> usize {
        self.pools.iter().map(|pool| pool.layers).max().unwrap_or(0)
    }
}
