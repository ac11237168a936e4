//! What would go if some snapshots went: references are taken away in an
//! overlay, so the cost follows what would die.

use std::collections::HashMap;

use super::table::{Row, Table, children, chunk_keys, load};
use crate::catalog::Entry;
use crate::depot::{Depot, StoredNode};
use crate::error::StoreError;
use crate::id::{NodeId, ObjectKey, PackId};
use crate::tree::stream::StreamSource;
use crate::tree::{ImageRef, Splitter};

/// What nothing needs any more.
#[derive(Debug, Default)]
pub(super) struct Freed {
    pub(super) chunk_bytes: u64,
    pub(super) shares: u64,
    pub(super) whole_packs: u64,
    pub(super) nodes_walked: u64,
}

/// References taken away so far.
#[derive(Debug)]
pub(super) struct Forgetting<'a> {
    depot: &'a Depot,
    table: &'a Table,
    lost: HashMap<ObjectKey, (u32, u32)>,
    dead: HashMap<PackId, u64>,
    freed: Freed,
}

impl<'a> Forgetting<'a> {
    pub(super) fn new(depot: &'a Depot, table: &'a Table) -> Self {
        let (lost, dead) = (HashMap::new(), HashMap::new());
        Self { depot, table, lost, dead, freed: Freed::default() }
    }

    /// Takes a snapshot away; each at most once.
    pub(super) fn forget(&mut self, entry: &Entry) -> Result<(), StoreError> {
        self.lose(entry.id.key());
        for key in self.table.events.get(&entry.id).into_iter().flatten() {
            self.lose(*key);
        }
        entry.record.images.iter().try_for_each(|(_, image)| self.lose_image(image))
    }

    fn lose_image(&mut self, image: &ImageRef) -> Result<(), StoreError> {
        if !self.lose(image.root.key()) {
            return Ok(());
        }
        let root = self.depot.root(image)?;
        root.top.map_or(Ok(()), |top| match root.splitter {
            Splitter::Fixed4K => self.lose_node(top, root.level()),
            Splitter::FastCdc16K => self.lose_stream_node(top),
        })
    }

    fn lose_stream_node(&mut self, id: NodeId) -> Result<(), StoreError> {
        if !self.lose(id.key()) {
            return Ok(());
        }
        let node = self.depot.load_stream_node(&id)?;
        self.freed.nodes_walked += 1;
        node.chunks().for_each(|chunk| {
            self.lose(chunk.key());
        });
        node.nodes().try_for_each(|child| self.lose_stream_node(child))
    }

    /// Takes one reference away and says whether it was the last of a tree.
    fn lose(&mut self, key: ObjectKey) -> bool {
        let Some(row) = self.table.rows.get(&key) else { return false };
        let lost = self.lost.entry(key).or_default();
        lost.0 += 1;
        let last = lost.0 == row.refs;
        if last && lost.1 == row.bases {
            self.die(row);
        }
        last
    }

    fn lose_node(&mut self, id: NodeId, level: u8) -> Result<(), StoreError> {
        if !self.lose(id.key()) {
            return Ok(());
        }
        let stored = load(self.depot, &id, level)?;
        self.freed.nodes_walked += 1;
        if self.is_dead(&id) {
            self.lose_base(&stored)?;
        }
        match level.checked_sub(1) {
            None => chunk_keys(&stored.node).into_iter().for_each(|key| {
                self.lose(key);
            }),
            Some(below) => {
                children(&stored.node).try_for_each(|child| self.lose_node(child, below))?;
            }
        }
        Ok(())
    }

    /// A patch died: its base may have been kept for it alone.
    fn lose_base(&mut self, patch: &StoredNode) -> Result<(), StoreError> {
        let Some(base) = patch.patch_of else { return Ok(()) };
        let Some(row) = self.table.rows.get(&base.key()) else { return Ok(()) };
        self.lost.entry(base.key()).or_default().1 += 1;
        if !self.is_dead(&base) {
            return Ok(());
        }
        self.die(row);
        self.freed.nodes_walked += 1;
        let stored = self.depot.stored_node(&base)?;
        self.lose_base(&stored)
    }

    fn is_dead(&self, id: &NodeId) -> bool {
        let row = self.table.rows.get(&id.key());
        row.is_some_and(|row| self.lost.get(&id.key()) == Some(&(row.refs, row.bases)))
    }

    fn die(&mut self, row: &Row) {
        self.freed.chunk_bytes += u64::from(row.chunk_len);
        self.freed.shares += u64::from(row.share.bytes);
        *self.dead.entry(row.share.pack).or_default() += 1;
    }

    /// What died in all.
    pub(super) fn freed(mut self) -> Result<Freed, StoreError> {
        for (pack, summary) in self.depot.packs() {
            let dead = self.dead.get(&pack);
            if dead.is_some() && dead == self.table.packs.get(&pack) {
                self.freed.whole_packs += summary.file_len;
            }
        }
        Ok(self.freed)
    }
}
