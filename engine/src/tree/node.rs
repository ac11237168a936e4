//! Nodes: up to 128 children and which of them exist.
//!
//! ```text
//! level u8 | zero u8 | children u16 | bitmap, 16 | id of each child, 32
//! ```
//!
//! Bit `n % 8` of bitmap byte `n / 8` stands for child `n`.

use super::{FANOUT, LEVEL_MAX};
use crate::error::FormatError;
use crate::id::NodeId;
use crate::pack::fields::{Fields, bound};

/// The id of a child: of a chunk in a leaf, of a node above.
pub(crate) type ChildId = [u8; 32];

/// A set of child numbers.
pub(crate) type Bitmap = [u8; FANOUT / 8];

/// A node in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) level: u8,
    children: Box<[Option<ChildId>; FANOUT]>,
}

impl Node {
    /// A node without children.
    pub(crate) fn empty(level: u8) -> Self {
        Self { level, children: Box::new([None; FANOUT]) }
    }

    pub(crate) fn children(&self) -> &[Option<ChildId>; FANOUT] {
        &self.children
    }

    /// Sets a child and says whether that changed anything.
    pub(crate) fn set(&mut self, slot: usize, child: Option<ChildId>) -> bool {
        std::mem::replace(&mut self.children[slot], child) != child
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.children.iter().all(Option::is_none)
    }

    /// The canonical bytes, whose hash is the node's id.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let present: Vec<&ChildId> = self.children.iter().flatten().collect();
        let count = u16::try_from(present.len()).expect("a node has at most 128 children");
        let mut out = Vec::with_capacity(4 + FANOUT / 8 + present.len() * 32);
        out.extend_from_slice(&[self.level, 0]);
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&bitmap(|slot| self.children[slot].is_some()));
        present.iter().for_each(|id| out.extend_from_slice(*id));
        out
    }

    /// Reads canonical bytes and nothing else.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        let level = fields.u8()?;
        bound("node level", u64::from(level), u64::from(LEVEL_MAX))?;
        fields.zeros(1, "node header")?;
        let count = fields.u16()?;
        let present: Bitmap = fields.array()?;
        let mut node = Self::empty(level);
        for slot in slots(&present) {
            node.children[slot] = Some(fields.array()?);
        }
        fields.end()?;
        if count == 0 || usize::from(count) != slots(&present).count() {
            return Err(FormatError::Field("node children"));
        }
        Ok(node)
    }

    /// The id of this node.
    pub(crate) fn id(&self) -> NodeId {
        NodeId::of(&self.encode())
    }
}

/// The bitmap of the slots for which `has` says yes.
pub(crate) fn bitmap(has: impl Fn(usize) -> bool) -> Bitmap {
    let mut bits = Bitmap::default();
    for slot in (0..FANOUT).filter(|slot| has(*slot)) {
        bits[slot / 8] |= 1 << (slot % 8);
    }
    bits
}

/// The slots in a bitmap, ascending.
pub(crate) fn slots(bits: &Bitmap) -> impl Iterator<Item = usize> + '_ {
    (0..FANOUT).filter(|slot| bits[slot / 8] & (1 << (slot % 8)) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Node {
        let mut node = Node::empty(1);
        for slot in [0, 7, 8, 127] {
            assert!(node.set(slot, Some([1; 32])));
        }
        node
    }

    #[test]
    fn nodes_survive() {
        let node = sample();
        assert_eq!(Node::decode(&node.encode()), Ok(node.clone()));
        assert_eq!(node.encode().len(), 20 + 4 * 32);
    }

    #[test]
    fn ids_depend_on_level_and_place() {
        let node = sample();
        let mut raised = node.clone();
        raised.level = 2;
        assert_ne!(node.id(), raised.id());
        let mut moved = node.clone();
        moved.set(7, None);
        moved.set(6, Some([1; 32]));
        assert_ne!(node.id(), moved.id());
    }

    #[test]
    fn other_bytes_are_refused() {
        let bytes = sample().encode();
        for len in 0..bytes.len() {
            assert!(Node::decode(&bytes[..len]).is_err(), "length {len}");
        }
        for (at, bad) in [(0, LEVEL_MAX + 1), (1, 1), (2, 5), (4, 0)] {
            let mut bytes = bytes.clone();
            bytes[at] = bad;
            assert!(Node::decode(&bytes).is_err(), "byte {at}");
        }
        assert!(Node::decode(&Node::empty(0).encode()).is_err());
    }
}
