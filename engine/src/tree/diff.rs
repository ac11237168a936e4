//! Which pages of two images differ.
//!
//! Equal subtrees are skipped by their id, so the cost follows the difference
//! and not the length. Pages behind the end of an image count as zeros.

use std::ops::Range;

use super::build::NodeSource;
use super::node::{ChildId, Node};
use super::walk::check_level;
use super::{FANOUT, RootRecord, span_of};
use crate::error::StoreError;
use crate::id::NodeId;
use crate::units::{PAGE_LEN, to_u64};

/// Where two images differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageDiff {
    /// Runs of pages that differ, of byte streams runs of bytes; ascending and
    /// never adjacent.
    pub runs: Vec<Range<u64>>,
    /// How many bytes one unit of a run stands for.
    pub unit_len: u64,
    /// Tree nodes that were read to know it.
    pub nodes_walked: u64,
}

impl ImageDiff {
    /// No difference yet.
    pub(super) fn of_units(unit_len: u64) -> Self {
        Self { runs: Vec::new(), unit_len, nodes_walked: 0 }
    }

    /// Pages that differ, of byte streams bytes.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    /// Bytes that differ.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages() * self.unit_len
    }

    /// The runs as bytes.
    pub fn extents(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs.iter().map(|run| run.start * self.unit_len..run.end * self.unit_len)
    }

    /// Adds a run behind the others.
    pub(super) fn add(&mut self, added: Range<u64>) {
        match self.runs.last_mut() {
            Some(run) if run.end == added.start => run.end = added.end,
            _ => self.runs.push(added),
        }
    }
}

/// A subtree of one image: a node, and its level.
type Side = Option<(NodeId, u8)>;

type Children = Box<[Option<ChildId>; FANOUT]>;

/// Compares two images.
pub(crate) fn diff(
    source: &dyn NodeSource,
    one: &RootRecord,
    other: &RootRecord,
) -> Result<ImageDiff, StoreError> {
    let side = |root: &RootRecord| root.top.map(|top| (top, root.level()));
    let level = one.level().max(other.level());
    let mut comparison = Comparison { source, found: ImageDiff::of_units(to_u64(PAGE_LEN)) };
    comparison.compare(side(one), side(other), level, 0)?;
    Ok(comparison.found)
}

struct Comparison<'s> {
    source: &'s dyn NodeSource,
    found: ImageDiff,
}

impl Comparison<'_> {
    /// Compares what covers the same pages at `level`.
    fn compare(&mut self, one: Side, other: Side, level: u8, first: u64) -> Result<(), StoreError> {
        if one == other {
            return Ok(());
        }
        let own = |side: Side| side.map_or(level, |(_, own)| own);
        if own(one).max(own(other)) < level {
            return self.compare(one, other, level - 1, first);
        }
        let left = self.children(one, level)?;
        let right = self.children(other, level)?;
        let span = span_of(level) / to_u64(FANOUT);
        for slot in 0..FANOUT {
            let at = first + to_u64(slot) * span;
            match level.checked_sub(1) {
                None if left[slot] != right[slot] => self.found.add(at..at + 1),
                None => {}
                Some(below) => {
                    let pick = |side: Side, children: &Children| match side {
                        // A lower image is the first descendant of what covers more.
                        Some((_, own)) if own < level => side.filter(|_| slot == 0),
                        _ => children[slot].map(|id| (NodeId::from_bytes(id), below)),
                    };
                    self.compare(pick(one, &left), pick(other, &right), below, at)?;
                }
            }
        }
        Ok(())
    }

    /// The children of a side that is as high as `level`; none otherwise.
    fn children(&mut self, side: Side, level: u8) -> Result<Children, StoreError> {
        match side {
            Some((id, own)) if own == level => {
                let node = self.source.load_node(&id)?;
                check_level(&id, &node, level)?;
                self.found.nodes_walked += 1;
                Ok(Box::new(*node.children()))
            }
            _ => Ok(Box::new(*Node::empty(level).children())),
        }
    }
}
