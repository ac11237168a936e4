//! From which image of a family to which each of its chunks is needed.
//!
//! Each node is read once, however many images have it. A chunk counts as
//! needed by all images between the first and the last that have it, which is
//! so in a lineage and nearly so in a family with branches.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::depot::Depot;
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId, ObjectKey};
use crate::tree::walk::check_level;
use crate::tree::{FANOUT, LEVEL_MAX, NodeSource, RootRecord, span_of};
use crate::units::{to_u32, to_u64};

/// From when to when something is needed, and where in the image it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Life {
    /// The first image that has it.
    pub(super) first: u32,
    /// The last image that has it.
    pub(super) last: u32,
    /// A page where it is, or where what it covers begins.
    pub(super) page: u64,
}

impl Life {
    fn join(&mut self, other: Self) {
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
    }
}

type Nodes = HashMap<NodeId, Life>;

/// The chunks of a family in some pages, and the leaves that name them.
#[derive(Debug, Default)]
pub(super) struct Lifetimes {
    pub(super) chunks: HashMap<ChunkId, Life>,
    pub(super) leaves: Vec<ObjectKey>,
}

/// Follows all images of a family through some pages.
pub(super) fn lifetimes(
    depot: &Depot,
    family: &[RootRecord],
    pages: &Range<u64>,
) -> Result<Lifetimes, StoreError> {
    let mut levels: BTreeMap<u8, Nodes> = BTreeMap::new();
    for (number, root) in family.iter().enumerate() {
        let number = to_u32(number);
        if let Some(top) = root.top {
            let life = Life { first: number, last: number, page: 0 };
            join(levels.entry(root.level()).or_default(), top, life);
        }
    }
    let mut found = Lifetimes::default();
    for level in (0..=LEVEL_MAX).rev() {
        let mut nodes: Vec<(NodeId, Life)> =
            levels.remove(&level).unwrap_or_default().into_iter().collect();
        // What was stored together is read together.
        nodes.sort_unstable_by_key(|(_, life)| (life.first, life.page));
        for (id, life) in nodes {
            let node = depot.load_node(&id)?;
            if level == 0 {
                found.leaves.push(id.key());
            }
            check_level(&id, &node, level)?;
            let span = span_of(level) / to_u64(FANOUT);
            for (child, slot) in node.children().iter().zip(0..) {
                let page = life.page + slot * span;
                let Some(child) = child else { continue };
                if page >= pages.end || page + span <= pages.start {
                    continue;
                }
                match level.checked_sub(1) {
                    None => {
                        let chunk = ChunkId::from_bytes(*child);
                        join(&mut found.chunks, chunk, Life { page, ..life });
                    }
                    Some(below) => {
                        let below = levels.entry(below).or_default();
                        join(below, NodeId::from_bytes(*child), Life { page, ..life });
                    }
                }
            }
        }
    }
    Ok(found)
}

fn join<K: std::hash::Hash + Eq>(lives: &mut HashMap<K, Life>, key: K, life: Life) {
    lives.entry(key).and_modify(|known| known.join(life)).or_insert(life);
}
