//! Patches: a node stored as the difference from another one, so that a
//! scattered set of changed pages does not store more node bytes than pages.
//!
//! ```text
//! node id, 32 | base id, 32 | changed bitmap, 16 | present bitmap, 16 | ids, 32 each
//! ```
//!
//! The ids are those of children that are both changed and present. The base
//! is always stored in full, so reading a node takes two reads at most. The
//! node's id is that of its full form.

use super::node::{Bitmap, Node, bitmap, slots};
use crate::error::FormatError;
use crate::id::NodeId;
use crate::pack::fields::Fields;

/// A patch is worth it up to this many changed children. While a leaf changes
/// child by child, its patches grow by 32 bytes each until it is stored in
/// full, 4,116 bytes: the mean is least where both parts are equal, at 16.
pub(crate) const CHANGES_MAX: usize = 16;

/// A decoded patch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Patch {
    pub(crate) node: NodeId,
    pub(crate) base: NodeId,
    changes: Vec<(usize, Option<[u8; 32]>)>,
}

impl Patch {
    /// What turns `base` into `node`, if that is little.
    pub(crate) fn between(
        (base_id, base): (NodeId, &Node),
        (node_id, node): (NodeId, &Node),
    ) -> Option<Self> {
        let pairs = base.children().iter().zip(node.children()).enumerate();
        let changes: Vec<_> = pairs
            .filter(|(_, (before, after))| before != after)
            .map(|(slot, (_, after))| (slot, *after))
            .collect();
        let worth_it = base.level == node.level && changes.len() <= CHANGES_MAX;
        worth_it.then_some(Self { node: node_id, base: base_id, changes })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(96 + 32 * self.changes.len());
        out.extend_from_slice(self.node.as_bytes());
        out.extend_from_slice(self.base.as_bytes());
        let has = |slot, wanted: fn(&Option<[u8; 32]>) -> bool| {
            self.changes.iter().any(|(changed, after)| *changed == slot && wanted(after))
        };
        out.extend_from_slice(&bitmap(|slot| has(slot, |_| true)));
        out.extend_from_slice(&bitmap(|slot| has(slot, Option::is_some)));
        self.changes
            .iter()
            .filter_map(|(_, after)| *after)
            .for_each(|id| out.extend_from_slice(&id));
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        let node = NodeId::from_bytes(fields.array()?);
        let base = NodeId::from_bytes(fields.array()?);
        let changed: Bitmap = fields.array()?;
        let present: Bitmap = fields.array()?;
        if changed.iter().zip(&present).any(|(changed, present)| present & !changed != 0) {
            return Err(FormatError::Field("patch bitmap"));
        }
        let mut changes = Vec::new();
        for slot in slots(&changed) {
            let is_present = present[slot / 8] & (1 << (slot % 8)) != 0;
            changes.push((slot, if is_present { Some(fields.array()?) } else { None }));
        }
        fields.end()?;
        Ok(Self { node, base, changes })
    }

    /// The full node, verified against its id.
    pub(crate) fn apply(&self, base: &Node) -> Result<Node, FormatError> {
        let mut node = base.clone();
        for (slot, child) in &self.changes {
            node.set(*slot, *child);
        }
        if node.id() == self.node { Ok(node) } else { Err(FormatError::Hash) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Node, Node) {
        let mut base = Node::empty(0);
        for slot in 0..100 {
            base.set(slot, Some([1; 32]));
        }
        let mut node = base.clone();
        node.set(3, None);
        node.set(50, Some([2; 32]));
        node.set(120, Some([3; 32]));
        (base, node)
    }

    #[test]
    fn patches_survive_and_apply() {
        let (base, node) = pair();
        let patch = Patch::between((base.id(), &base), (node.id(), &node)).expect("few changes");
        let bytes = patch.encode();
        assert_eq!(bytes.len(), 96 + 2 * 32);
        let read = Patch::decode(&bytes).expect("a sound patch");
        assert_eq!(read, patch);
        assert_eq!(read.apply(&base), Ok(node));
        assert_eq!(read.apply(&Node::empty(0)), Err(FormatError::Hash));
        for len in 0..bytes.len() {
            assert!(Patch::decode(&bytes[..len]).is_err(), "length {len}");
        }
    }

    #[test]
    fn many_changes_are_no_patch() {
        let (base, _) = pair();
        let mut node = base.clone();
        for slot in 0..=CHANGES_MAX {
            node.set(slot, Some([9; 32]));
        }
        assert_eq!(Patch::between((base.id(), &base), (node.id(), &node)), None);
    }
}
