//! Reading nodes, roots and records, each verified against its id.

use std::sync::Arc;

use super::{Depot, Location, NODE_LEN, Spot};
use crate::env::lock;
use crate::error::{FormatError, StoreError};
use crate::id::{NodeId, ObjectKey, Root};
use crate::index::Place;
use crate::pack::ObjectKind;
use crate::tree::patch::Patch;
use crate::tree::{ImageRef, Node, NodeSource, RootRecord};

/// Patches are made on full nodes. When two sessions store the same node at
/// once, one of them may store it as a patch after the other's full one was
/// patched upon; this bounds how long such a chain may get.
const PATCH_DEPTH_MAX: u8 = 8;

/// A node and how it is stored.
#[derive(Debug, Clone)]
pub(crate) struct StoredNode {
    pub(crate) node: Arc<Node>,
    /// The full node that it is stored as a patch of.
    pub(crate) patch_of: Option<NodeId>,
}

impl Depot {
    /// The bytes of an object that is not a page. The caller verifies them.
    pub(super) fn object(
        &self,
        key: ObjectKey,
    ) -> Result<Option<(Location, ObjectKind, Vec<u8>)>, StoreError> {
        let read = || {
            let Some(place) = self.place(key)? else { return Ok(None) };
            let Some(location) = self.location(place)? else { return Ok(None) };
            Ok(Some((location, self.frame(location.pack, &location.span)?)))
        };
        let Some((location, frame)) = self.following(read)? else { return Ok(None) };
        let damaged = damage_at(location);
        let found = frame.object(location.slot).map_err(damaged)?;
        Ok(found.map(|object| (location, object.kind, object.bytes.to_vec())))
    }

    /// A node and how it is stored.
    pub(crate) fn stored_node(&self, id: &NodeId) -> Result<StoredNode, StoreError> {
        self.resolve(id, PATCH_DEPTH_MAX)
    }

    fn resolve(&self, id: &NodeId, depth_left: u8) -> Result<StoredNode, StoreError> {
        let Some((location, kind, bytes)) = self.object(id.key())? else {
            return Err(StoreError::Missing { what: "tree node", id: id.to_string() });
        };
        let bad = damage_at(location);
        match kind {
            ObjectKind::Node if NodeId::of(&bytes) == *id => {
                let node = Arc::new(Node::decode(&bytes).map_err(bad)?);
                Ok(StoredNode { node, patch_of: None })
            }
            ObjectKind::NodePatch => {
                let patch = Patch::decode(&bytes).map_err(bad)?;
                let Some(left) = depth_left.checked_sub(1).filter(|_| patch.node == *id) else {
                    return Err(damage_at(location)(FormatError::Hash));
                };
                let base = self.resolve(&patch.base, left)?;
                let node = Arc::new(patch.apply(&base.node).map_err(damage_at(location))?);
                Ok(StoredNode { node, patch_of: Some(patch.base) })
            }
            _ => Err(bad(FormatError::Hash)),
        }
    }

    /// The full node that the node at this place is stored as a patch of, if
    /// it is one; `None` if there is no node.
    pub(crate) fn form_at(&self, place: Place) -> Result<Option<Option<NodeId>>, StoreError> {
        let Some(location) = self.location(place)? else { return Ok(None) };
        let frame = self.frame(location.pack, &location.span)?;
        let found = frame.object(location.slot).map_err(damage_at(location))?;
        Ok(match found.map(|object| (object.kind, object.bytes)) {
            Some((ObjectKind::Node, _)) => Some(None),
            Some((ObjectKind::NodePatch, bytes)) => {
                Some(Some(Patch::decode(bytes).map_err(damage_at(location))?.base))
            }
            _ => None,
        })
    }

    /// The root of an image, which must agree with the reference.
    pub(crate) fn root(&self, image: &ImageRef) -> Result<RootRecord, StoreError> {
        let Some((location, kind, bytes)) = self.object(image.root.key())? else {
            return Err(StoreError::Missing { what: "image", id: image.root.to_string() });
        };
        if kind != ObjectKind::Root || Root::of(&bytes) != image.root {
            return Err(damage_at(location)(FormatError::Hash));
        }
        let record = RootRecord::decode(&bytes).map_err(damage_at(location))?;
        if record.image() == *image {
            Ok(record)
        } else {
            Err(StoreError::Invalid("the image has another length or splitter than its root"))
        }
    }
}

/// A node that was read or made lately. Its content is what its id says; how
/// it is stored is a hint, for another session may have stored it otherwise.
#[derive(Debug, Clone)]
pub(crate) struct RecentNode {
    pub(crate) node: Arc<Node>,
    pub(crate) patch_of: Option<NodeId>,
}

impl Depot {
    /// Remembers a node that is about to be stored. That it is remembered says
    /// nothing of its being there: whoever relies on that asks the index.
    pub(crate) fn remember(&self, id: NodeId, node: &Node, patch_of: Option<NodeId>) {
        let recent = RecentNode { node: Arc::new(node.clone()), patch_of };
        lock(&self.nodes).put(id, recent, NODE_LEN);
    }

    /// A verified node, and perhaps how it is stored.
    pub(crate) fn recent_node(&self, id: &NodeId) -> Result<RecentNode, StoreError> {
        if let Some(recent) = lock(&self.nodes).get(id) {
            return Ok(recent);
        }
        let StoredNode { node, patch_of } = self.stored_node(id)?;
        let recent = RecentNode { node, patch_of };
        lock(&self.nodes).put(*id, recent.clone(), NODE_LEN);
        Ok(recent)
    }
}

/// Reading by hints, for whoever wants the content only.
impl Depot {
    /// A verified node; `own` says where it may lie. How it is stored is a
    /// hint, as with [`RecentNode`].
    pub(crate) fn node_to_read(
        &self,
        id: &NodeId,
        own: Option<Spot>,
    ) -> Result<RecentNode, StoreError> {
        self.read_node(id, own, PATCH_DEPTH_MAX)
    }

    fn read_node(
        &self,
        id: &NodeId,
        own: Option<Spot>,
        depth_left: u8,
    ) -> Result<RecentNode, StoreError> {
        if let Some(recent) = lock(&self.nodes).get(id) {
            return Ok(recent);
        }
        if let Some(spot) = own
            && let Ok(recent) = self.node_at(id, &spot, depth_left)
        {
            lock(&self.nodes).put(*id, recent.clone(), NODE_LEN);
            return Ok(recent);
        }
        let recent = self.recent_node(id)?;
        self.renew_own_spot(id.key());
        Ok(recent)
    }

    fn node_at(&self, id: &NodeId, at: &Spot, depth_left: u8) -> Result<RecentNode, StoreError> {
        let frame = self.frame(at.pack, &at.objects())?;
        let bad = |source| StoreError::Damaged { pack: at.pack, offset: at.offset, source };
        let object = frame.object(at.slot).map_err(bad)?;
        match object.map(|object| (object.kind, object.bytes)) {
            Some((ObjectKind::Node, bytes)) if NodeId::of(bytes) == *id => {
                let node = Arc::new(Node::decode(bytes).map_err(bad)?);
                Ok(RecentNode { node, patch_of: None })
            }
            Some((ObjectKind::NodePatch, bytes)) => {
                let patch = Patch::decode(bytes).map_err(bad)?;
                let left = depth_left.checked_sub(1).filter(|_| patch.node == *id);
                let left = left.ok_or(FormatError::Hash).map_err(bad)?;
                let own = self.own_spots(&[patch.base.key()]).pop().flatten();
                let base = self.read_node(&patch.base, own, left)?;
                let node = Arc::new(patch.apply(&base.node).map_err(bad)?);
                Ok(RecentNode { node, patch_of: Some(patch.base) })
            }
            _ => Err(bad(FormatError::Hash)),
        }
    }

    /// The root of an image, which must agree with the reference.
    pub(crate) fn root_to_read(&self, image: &ImageRef) -> Result<RootRecord, StoreError> {
        let own = self.own_spots(&[image.root.key()]).pop().flatten();
        let hinted = own.and_then(|at| {
            let frame = self.frame(at.pack, &at.objects()).ok()?;
            let object = frame.object(at.slot).ok()??;
            let is_root = object.kind == ObjectKind::Root && Root::of(object.bytes) == image.root;
            let record = RootRecord::decode(object.bytes).ok().filter(|_| is_root)?;
            (record.image() == *image).then_some(record)
        });
        if let Some(root) = hinted {
            return Ok(root);
        }
        let root = self.root(image)?;
        self.renew_own_spot(image.root.key());
        Ok(root)
    }
}

impl NodeSource for Depot {
    fn load_node(&self, id: &NodeId) -> Result<Arc<Node>, StoreError> {
        self.recent_node(id).map(|recent| recent.node)
    }
}

pub(super) fn damage_at(location: Location) -> impl FnOnce(FormatError) -> StoreError {
    move |source| StoreError::Damaged { pack: location.pack, offset: location.span.offset, source }
}
