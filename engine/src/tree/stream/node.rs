//! Nodes of a stream's tree.
//!
//! ```text
//! level u8 | 1 u8 | children u16 | children
//! child of a leaf:   chunk id, 32 (zeros: the bytes are zero) | length u32
//! child of others:   node id, 32                              | length u64
//! ```
//!
//! The second byte tells them from nodes over pages, so that both share one
//! kind of id.

use super::{CHILDREN_MAX, STREAM_LEVEL_MAX, ends_node};
use crate::chunk::{CUT_MAX, CUT_MIN};
use crate::error::FormatError;
use crate::id::{ChunkId, NodeId};
use crate::pack::fields::{Fields, bound};
use crate::units::{IMAGE_LEN_MAX, to_u64};

/// The second byte of every such node.
const FORM: u8 = 1;

/// What a node lists: a chunk in a leaf, a node above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Child {
    /// The id; zeros in a leaf stand for bytes that are zero.
    pub(crate) id: [u8; 32],
    /// Bytes of the stream that it covers.
    pub(crate) len: u64,
}

impl Child {
    /// The chunk of a leaf's child; `None` for zeros.
    pub(crate) fn chunk(&self) -> Option<ChunkId> {
        (self.id != [0; 32]).then(|| ChunkId::from_bytes(self.id))
    }
}

/// A node in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StreamNode {
    pub(crate) level: u8,
    pub(crate) children: Vec<Child>,
}

impl StreamNode {
    /// The nodes below it; none below a leaf.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        let above = if self.level == 0 { &[][..] } else { &self.children };
        above.iter().map(|child| NodeId::from_bytes(child.id))
    }

    /// The chunks of a leaf that are not zeros; none of other nodes.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = ChunkId> + '_ {
        let leaf = if self.level == 0 { &self.children[..] } else { &[] };
        leaf.iter().filter_map(Child::chunk)
    }

    /// Bytes of the stream that it covers.
    pub(crate) fn len(&self) -> u64 {
        self.children.iter().map(|child| child.len).sum()
    }

    /// Whether it is full: a sibling may follow.
    pub(crate) fn is_ended(&self) -> bool {
        self.children.last().is_some_and(|last| ends_node(self.children.len(), &last.id))
    }

    /// The canonical bytes, whose hash is the node's id.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let count = u16::try_from(self.children.len()).expect("a node has at most 256 children");
        let mut out = Vec::with_capacity(4 + 40 * self.children.len());
        out.extend_from_slice(&[self.level, FORM]);
        out.extend_from_slice(&count.to_le_bytes());
        for child in &self.children {
            out.extend_from_slice(&child.id);
            let len = child.len.to_le_bytes();
            out.extend_from_slice(if self.level == 0 { &len[..4] } else { &len });
        }
        out
    }

    /// Reads canonical bytes and nothing else.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        let level = fields.u8()?;
        bound("node level", u64::from(level), u64::from(STREAM_LEVEL_MAX))?;
        if fields.u8()? != FORM {
            return Err(FormatError::Field("node form"));
        }
        let count = usize::from(fields.u16()?);
        bound("node children", to_u64(count), to_u64(CHILDREN_MAX))?;
        let mut children = Vec::with_capacity(count);
        for _ in 0..count {
            let id = fields.array()?;
            let len = if level == 0 { u64::from(fields.u32()?) } else { fields.u64()? };
            children.push(Child { id, len });
        }
        fields.end()?;
        let node = Self { level, children };
        node.check()?;
        Ok(node)
    }

    /// What holds for a node wherever it sits.
    fn check(&self) -> Result<(), FormatError> {
        let Some((last, others)) = self.children.split_last() else {
            return Err(FormatError::Field("node children"));
        };
        let len_max = if self.level == 0 { to_u64(CUT_MAX) } else { IMAGE_LEN_MAX };
        let len_min = if self.level == 0 { to_u64(CUT_MIN) } else { 1 };
        let in_range = others.iter().all(|child| (len_min..=len_max).contains(&child.len));
        if !in_range || !(1..=len_max).contains(&last.len) {
            return Err(FormatError::Field("length of a node's child"));
        }
        bound("length of a node", self.len(), IMAGE_LEN_MAX)?;
        let mut counted = others.iter().zip(1..);
        if counted.any(|(child, children)| ends_node(children, &child.id)) {
            return Err(FormatError::Field("end of a node"));
        }
        Ok(())
    }

    /// What holds for a node where it sits: it covers `len` bytes, and every
    /// node but the last of its level has ended, behind a chunk of full length.
    pub(crate) fn check_place(
        &self,
        level: u8,
        len: u64,
        is_last: bool,
    ) -> Result<(), FormatError> {
        if self.level != level {
            return Err(FormatError::Field("node level"));
        }
        if self.len() != len {
            return Err(FormatError::Field("length of a node"));
        }
        let short = level == 0 && self.children.last().is_some_and(|c| c.len < to_u64(CUT_MIN));
        if !is_last && (short || !self.is_ended()) {
            return Err(FormatError::Field("end of a node"));
        }
        Ok(())
    }

    /// The id of this node.
    pub(crate) fn id(&self) -> NodeId {
        NodeId::of(&self.encode())
    }
}

/// A node of five children.
#[cfg(test)]
pub(crate) fn sample_node(level: u8) -> StreamNode {
    let child = |n: u8| Child { id: [n; 32], len: 5000 + u64::from(n) };
    StreamNode { level, children: (0..5).map(child).collect() }
}

#[cfg(test)]
mod tests {
    use super::sample_node as sample;
    use super::*;

    #[test]
    fn nodes_survive() {
        for level in [0, 1, STREAM_LEVEL_MAX] {
            let node = sample(level);
            let bytes = node.encode();
            assert_eq!(bytes.len(), 4 + 5 * if level == 0 { 36 } else { 40 });
            assert_eq!(StreamNode::decode(&bytes), Ok(node.clone()));
            assert_eq!(node.len(), 25_010);
            assert_eq!(node.check_place(level, 25_010, true), Ok(()));
            assert!(node.check_place(level, 25_010, false).is_err(), "it has not ended");
            for len in 0..bytes.len() {
                assert!(StreamNode::decode(&bytes[..len]).is_err(), "length {len}");
            }
        }
        assert!(crate::tree::Node::decode(&sample(0).encode()).is_err());
    }

    #[test]
    fn what_the_builder_never_writes_is_refused() {
        let changed = |change: fn(&mut StreamNode)| {
            let mut node = sample(0);
            change(&mut node);
            StreamNode::decode(&node.encode())
        };
        assert!(changed(|node| node.level = STREAM_LEVEL_MAX + 1).is_err());
        assert!(changed(|node| node.children.clear()).is_err());
        assert!(changed(|node| node.children[0].len = 0).is_err());
        assert!(changed(|node| node.children[1].len = 4095).is_err());
        assert!(changed(|node| node.children[4].len = 65_537).is_err());
        assert!(changed(|node| node.children[4].len = 1).is_ok(), "the last of a stream");
        assert!(changed(|node| node.children[3].id[31] = 252).is_err(), "it ended there");
        assert!(changed(|node| node.children[2].id[31] = 252).is_ok(), "too early to end");
        let many = |count| StreamNode { level: 0, children: vec![sample(0).children[0]; count] };
        assert!(StreamNode::decode(&many(256).encode()).is_ok());
        assert!(StreamNode::decode(&many(257).encode()).is_err());
        let long = Child { id: [1; 32], len: IMAGE_LEN_MAX };
        let node = StreamNode { level: 1, children: vec![long; 2] };
        assert!(StreamNode::decode(&node.encode()).is_err());
    }
}
