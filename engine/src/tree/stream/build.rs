//! Building the tree of a stream from its chunks, in order. Only one open
//! node a level is in memory.

use super::node::{Child, StreamNode};
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId};
use crate::tree::{RootRecord, Splitter};
use crate::units::to_u64;

/// Where new nodes go.
pub(crate) trait StreamSink {
    /// Keeps a node.
    fn store_stream_node(&mut self, id: NodeId, node: &StreamNode) -> Result<(), StoreError>;
}

/// A level that is being grouped into nodes.
#[derive(Debug, Default)]
struct Level {
    open: Vec<Child>,
    /// Nodes of this level that have ended.
    ended: u64,
}

/// The open node of each level.
#[derive(Debug, Default)]
pub(crate) struct StreamBuilder {
    levels: Vec<Level>,
    len: u64,
}

impl StreamBuilder {
    /// Appends a chunk; `None` is a chunk of zeros.
    pub(crate) fn push(
        &mut self,
        chunk: Option<ChunkId>,
        len: usize,
        sink: &mut dyn StreamSink,
    ) -> Result<(), StoreError> {
        let len = to_u64(len);
        self.len += len;
        let id = chunk.map_or([0; 32], |chunk| *chunk.as_bytes());
        self.add(0, Child { id, len }, sink)
    }

    /// Bytes of all chunks so far.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Adds a child to a level, and ends nodes upwards as their ids say.
    fn add(
        &mut self,
        mut level: usize,
        mut child: Child,
        sink: &mut dyn StreamSink,
    ) -> Result<(), StoreError> {
        loop {
            if level == self.levels.len() {
                self.levels.push(Level::default());
            }
            let open = &mut self.levels[level].open;
            open.push(child);
            if !super::ends_node(open.len(), &child.id) {
                return Ok(());
            }
            child = self.end(level, sink)?;
            level += 1;
        }
    }

    /// Ends the open node of a level; the child that stands for it above.
    fn end(&mut self, level: usize, sink: &mut dyn StreamSink) -> Result<Child, StoreError> {
        let this = &mut self.levels[level];
        this.ended += 1;
        let children = std::mem::take(&mut this.open);
        let level = u8::try_from(level).expect("a tree has at most 16 levels");
        let node = StreamNode { level, children };
        let id = node.id();
        sink.store_stream_node(id, &node)?;
        Ok(Child { id: *id.as_bytes(), len: node.len() })
    }

    /// Ends everything. The first level that is one node is the top.
    pub(crate) fn finish(mut self, sink: &mut dyn StreamSink) -> Result<RootRecord, StoreError> {
        let mut top = None;
        let mut level = 0;
        while level < self.levels.len() {
            if self.levels[level].open.is_empty() {
                // The last node ended by itself, so it is in the level above,
                // alone if it is the only one.
                if self.levels[level].ended == 1 {
                    top = self.levels[level + 1].open.first().copied();
                    break;
                }
                level += 1;
                continue;
            }
            let last = self.end(level, sink)?;
            if self.levels[level].ended == 1 {
                top = Some(last);
                break;
            }
            level += 1;
            self.add(level, last, sink)?;
        }
        let top = top.map(|top| NodeId::from_bytes(top.id));
        Ok(RootRecord { splitter: Splitter::FastCdc16K, len: self.len, top })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::walk::{Piece, StreamSource, walk};
    use super::super::{CHILDREN_MAX, CHILDREN_MIN};
    use super::*;

    #[derive(Default)]
    struct Nodes(HashMap<NodeId, Arc<StreamNode>>);

    impl StreamSink for Nodes {
        fn store_stream_node(&mut self, id: NodeId, node: &StreamNode) -> Result<(), StoreError> {
            let read = StreamNode::decode(&node.encode()).expect("built nodes are canonical");
            self.0.insert(id, Arc::new(read));
            Ok(())
        }
    }

    impl StreamSource for Nodes {
        fn load_stream_node(&self, id: &NodeId) -> Result<Arc<StreamNode>, StoreError> {
            Ok(Arc::clone(&self.0[id]))
        }
    }

    type Chunk = (Option<ChunkId>, usize);

    fn build(chunks: &[Chunk]) -> (RootRecord, Nodes) {
        let mut nodes = Nodes::default();
        let mut builder = StreamBuilder::default();
        for (id, len) in chunks {
            builder.push(*id, *len, &mut nodes).expect("a chunk");
        }
        (builder.finish(&mut nodes).expect("a root"), nodes)
    }

    /// The top node the obvious way: level by level, all at once.
    fn naive_top(chunks: &[Chunk]) -> Option<NodeId> {
        let mut level = 0;
        let mut children: Vec<Child> = chunks
            .iter()
            .map(|(id, len)| Child {
                id: id.map_or([0; 32], |id| *id.as_bytes()),
                len: to_u64(*len),
            })
            .collect();
        while !children.is_empty() {
            let mut groups = vec![Vec::new()];
            for child in &children {
                let group = groups.last_mut().expect("a group");
                group.push(*child);
                let full = group.len() >= CHILDREN_MIN && child.id[31] >= 252;
                if full || group.len() == CHILDREN_MAX {
                    groups.push(Vec::new());
                }
            }
            groups.retain(|group| !group.is_empty());
            let nodes = groups.into_iter().map(|children| StreamNode { level, children });
            children =
                nodes.map(|node| Child { id: *node.id().as_bytes(), len: node.len() }).collect();
            if let [top] = children[..] {
                return Some(NodeId::from_bytes(top.id));
            }
            level += 1;
        }
        None
    }

    fn chunks_of(seed: u32, count: usize) -> Vec<Chunk> {
        let chunk = |n: u32| (Some(ChunkId::of(&[seed, n].map(u32::to_le_bytes).concat())), 5000);
        (0..).map(chunk).take(count).collect()
    }

    #[test]
    fn an_insertion_changes_one_path() {
        let before = chunks_of(1, 100_000);
        let mut after = before.clone();
        after.insert(10, (Some(ChunkId::of(b"new")), 4096));
        let (_, old) = build(&before);
        let (_, new) = build(&after);
        let fresh = new.0.keys().filter(|id| !old.0.contains_key(*id)).count();
        assert!(old.0.len() > 1000, "{} nodes", old.0.len());
        assert!(fresh <= 12, "{fresh} new nodes");
    }

    #[test]
    fn equal_chunks_make_few_nodes() {
        let (root, nodes) = build(&vec![(None, 65_536); 100_000]);
        assert!(nodes.0.len() <= 8, "{} nodes", nodes.0.len());
        let mut seen = 0;
        walk(&nodes, &root, &(0..u64::MAX), &mut |piece| {
            assert_eq!(piece.chunk, None);
            seen += piece.len;
            Ok(())
        })
        .expect("a walk");
        assert_eq!(seen, root.len);
    }

    /// Ids that end nodes as often as possible, so that trees get high.
    fn chunk() -> impl Strategy<Value = Chunk> {
        (prop_oneof![Just(255_u8), any::<u8>()], prop::bool::weighted(0.1), 4096..=65_536_usize)
            .prop_map(|(last, zero, len)| {
                let mut id = [last; 32];
                id[0] = 1;
                ((!zero).then(|| ChunkId::from_bytes(id)), len)
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn trees_are_those_of_the_oracle(
            mut chunks in prop::collection::vec(chunk(), 0..1500),
            last in 1..65_536_usize,
            range in any::<(prop::sample::Index, prop::sample::Index)>(),
        ) {
            if let Some(chunk) = chunks.last_mut() {
                chunk.1 = last;
            }
            let (root, nodes) = build(&chunks);
            prop_assert_eq!(root.top, naive_top(&chunks));
            let total: usize = chunks.iter().map(|(_, len)| len).sum();
            prop_assert_eq!(root.len, to_u64(total));
            let (from, to) = (range.0.index(total + 1), range.1.index(total + 1));
            let range = to_u64(from.min(to))..to_u64(from.max(to));
            let mut expected = Vec::new();
            let mut offset = 0;
            for (chunk, len) in &chunks {
                let piece = Piece { offset, len: to_u64(*len), chunk: *chunk };
                offset += piece.len;
                if piece.offset < range.end && offset > range.start {
                    expected.push(piece);
                }
            }
            let mut found = Vec::new();
            walk(&nodes, &root, &range, &mut |piece| {
                found.push(piece);
                Ok(())
            })
            .expect("a walk");
            prop_assert_eq!(found, expected);
        }
    }
}
