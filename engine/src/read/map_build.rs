//! Building a page map: the tree says which chunks, and hints say where they
//! lie. The index is asked for what no hint is good for, and the answer is
//! kept for the next time.

use std::ops::Range;
use std::sync::Arc;

use foldhash::{HashMap as FastMap, HashMapExt};

use super::map::{FrameRef, PageMap, Row};
use crate::depot::{
    Depot, HintEpoch, LeafHint, Locator, PublishedPacks, RecentNode, Resolved, Spot,
};
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId, ObjectKey, PackId};
use crate::tree::walk::check_level;
use crate::tree::{FANOUT, Node, RootRecord, span_of};
use crate::units::{to_u32, to_u64, to_usize};

/// Leaves looked up together.
const BATCH: usize = 128;

/// Whom to ask where things lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Hints first.
    Hints,
    /// The index only.
    Index,
}

/// A leaf and its first page.
#[derive(Debug, Clone, Copy)]
struct Leaf {
    id: NodeId,
    first: u64,
}

/// A leaf of which is being found out where its chunks lie.
struct Open {
    leaf: Leaf,
    node: Arc<Node>,
    patch_of: Option<NodeId>,
    hint: LeafHint,
    /// More is known than the hint said.
    is_news: bool,
}

/// A map and the leaves that it was made of.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) map: PageMap,
    /// First pages and keys of the leaves, ascending.
    pub(super) leaves: Vec<(u64, ObjectKey)>,
}

/// Collects rows and the frames that they need.
struct Builder<'d> {
    depot: &'d Depot,
    ask: Ask,
    epoch: HintEpoch,
    range: Range<u64>,
    locator: Locator<'d>,
    packs: PublishedPacks,
    frames: Vec<FrameRef>,
    frame_numbers: FastMap<(PackId, u64), u32>,
    last: Option<(FrameRef, u32)>,
    rows: Vec<Row>,
}

/// The map of the pages in `range`; those outside it appear as zero.
pub(crate) fn build(
    depot: &Depot,
    root: &RootRecord,
    range: &Range<u64>,
    ask: Ask,
) -> Result<Built, StoreError> {
    root.require_pages()?;
    let mut builder = Builder {
        depot,
        ask,
        epoch: depot.hint_epoch(),
        range: range.clone(),
        locator: Locator::new(depot),
        packs: PublishedPacks::default(),
        frames: Vec::new(),
        frame_numbers: FastMap::new(),
        last: None,
        rows: Vec::new(),
    };
    let mut leaves = Vec::new();
    if let Some(top) = root.top {
        let own = builder.own_spots(&[top]).pop().flatten();
        builder.leaves(&top, own, root.level(), 0, &mut leaves)?;
    }
    for batch in leaves.chunks(BATCH) {
        builder.add_leaves(batch)?;
    }
    let map = PageMap::new(root.len, builder.frames, builder.rows);
    Ok(Built { map, leaves: leaves.iter().map(|leaf| (leaf.first, leaf.id.key())).collect() })
}

impl Builder<'_> {
    fn own_spots(&self, nodes: &[NodeId]) -> Vec<Option<Spot>> {
        match self.ask {
            Ask::Hints => {
                let keys: Vec<ObjectKey> = nodes.iter().map(NodeId::key).collect();
                self.depot.own_spots(&keys)
            }
            Ask::Index => vec![None; nodes.len()],
        }
    }

    fn node(&self, id: &NodeId, own: Option<Spot>) -> Result<RecentNode, StoreError> {
        match self.ask {
            Ask::Hints => self.depot.node_to_read(id, own),
            Ask::Index => self.depot.recent_node(id),
        }
    }

    /// The leaves under a node that cover a part of the range.
    fn leaves(
        &self,
        id: &NodeId,
        own: Option<Spot>,
        level: u8,
        first: u64,
        leaves: &mut Vec<Leaf>,
    ) -> Result<(), StoreError> {
        let Some(below) = level.checked_sub(1) else {
            leaves.push(Leaf { id: *id, first });
            return Ok(());
        };
        let node = self.node(id, own)?.node;
        check_level(id, &node, level)?;
        let span = span_of(below);
        let covered: Vec<(u64, NodeId)> = (0_u64..)
            .zip(node.children())
            .filter_map(|(at, child)| Some((first + at * span, NodeId::from_bytes((*child)?))))
            .filter(|(at, _)| at + span > self.range.start && *at < self.range.end)
            .collect();
        // Those of leaves are read together with what is known of their chunks.
        let own = match below {
            0 => vec![None; covered.len()],
            _ => self.own_spots(&covered.iter().map(|(_, id)| *id).collect::<Vec<_>>()),
        };
        for ((at, child), own) in covered.into_iter().zip(own) {
            self.leaves(&child, own, below, at, leaves)?;
        }
        Ok(())
    }

    fn add_leaves(&mut self, batch: &[Leaf]) -> Result<(), StoreError> {
        let keys: Vec<ObjectKey> = batch.iter().map(|leaf| leaf.id.key()).collect();
        let hints = match self.ask {
            Ask::Hints => self.depot.leaf_hints(&keys),
            Ask::Index => vec![LeafHint::unknown(); batch.len()],
        };
        let mut open = Vec::with_capacity(batch.len());
        for (leaf, mut hint) in batch.iter().zip(hints) {
            hint.own = hint.own.filter(|at| self.packs.have(self.depot, at));
            let recent = self.node(&leaf.id, hint.own)?;
            check_level(&leaf.id, &recent.node, 0)?;
            for spot in &mut hint.chunks[children_in(leaf.first, &self.range)] {
                *spot = spot.filter(|at| self.packs.have(self.depot, at));
            }
            let (node, patch_of) = (recent.node, recent.patch_of);
            open.push(Open { leaf: *leaf, node, patch_of, hint, is_news: false });
        }
        self.complete(&mut open)?;
        open.iter().for_each(|open| self.add_rows(open));
        self.keep(&open);
        Ok(())
    }

    /// Asks the index for all places that no hint told.
    fn complete(&mut self, open: &mut [Open]) -> Result<(), StoreError> {
        let mut missing: Vec<(usize, Option<usize>)> = Vec::new();
        let mut keys: Vec<ObjectKey> = Vec::new();
        for (number, one) in open.iter().enumerate() {
            for (at, chunk) in wanted(one, &self.range) {
                if one.hint.chunks[at].is_none() {
                    missing.push((number, Some(at)));
                    keys.push(chunk.key());
                }
            }
            if one.hint.own.is_none() && self.ask != Ask::Index {
                missing.push((number, None));
                keys.push(one.leaf.id.key());
            }
        }
        let found = self.locator.locate(&keys)?;
        for ((number, at), location) in missing.into_iter().zip(found) {
            let one = &mut open[number];
            let spot = location.map(Spot::from);
            one.is_news |= spot.is_some();
            match at {
                Some(at) => one.hint.chunks[at] = spot,
                None => one.hint.own = spot,
            }
        }
        Ok(())
    }

    fn keep(&self, open: &[Open]) {
        if self.ask == Ask::Index {
            return;
        }
        for one in open.iter().filter(|one| one.is_news) {
            let Open { leaf, node, patch_of, hint, .. } = one;
            let resolved = Resolved { leaf: leaf.id, node, patch_of: *patch_of, hint };
            self.depot.keep_hints(self.epoch, self.depot.records_of(&resolved));
        }
    }

    fn add_rows(&mut self, open: &Open) {
        for (at, chunk) in wanted(open, &self.range) {
            let (frame, slot) = open.hint.chunks[at].map_or((FrameRef::NOWHERE, 0), |spot| {
                let Spot { pack, offset, len, count, slot } = spot;
                (FrameRef { pack, offset, len, count }, slot)
            });
            let frame = self.frame_number(frame);
            let page = open.leaf.first + to_u64(at);
            let page = u32::try_from(page).expect("an image has at most 2^32 pages");
            self.rows.push(Row { page, frame, slot, chunk });
        }
    }

    fn frame_number(&mut self, frame: FrameRef) -> u32 {
        if let Some((last, number)) = self.last
            && last == frame
        {
            return number;
        }
        let frames = &mut self.frames;
        let number = *self.frame_numbers.entry((frame.pack, frame.offset)).or_insert_with(|| {
            frames.push(frame);
            to_u32(frames.len() - 1)
        });
        self.last = Some((frame, number));
        number
    }
}

/// The chunks of a leaf that lie in the range, by child.
fn wanted<'o>(
    open: &'o Open,
    range: &Range<u64>,
) -> impl Iterator<Item = (usize, ChunkId)> + use<'o> {
    let children = children_in(open.leaf.first, range);
    let chunks = children.clone().zip(&open.node.children()[children]);
    chunks.filter_map(|(at, chunk)| Some((at, ChunkId::from_bytes((*chunk)?))))
}

/// The children of the leaf that begins at page `first` which lie in the range.
fn children_in(first: u64, range: &Range<u64>) -> Range<usize> {
    let limit = to_u64(FANOUT);
    let start = to_usize(range.start.saturating_sub(first).min(limit));
    start..to_usize(range.end.saturating_sub(first).min(limit)).max(start)
}
