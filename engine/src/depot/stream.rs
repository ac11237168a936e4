//! Reading the nodes of streams, each verified against its id.

use std::sync::Arc;

use super::Depot;
use super::nodes::damage_at;
use crate::error::{FormatError, StoreError};
use crate::id::NodeId;
use crate::pack::ObjectKind;
use crate::tree::stream::{StreamNode, StreamSource};

impl StreamSource for Depot {
    fn load_stream_node(&self, id: &NodeId) -> Result<Arc<StreamNode>, StoreError> {
        let Some((location, kind, bytes)) = self.object(id.key())? else {
            return Err(StoreError::Missing { what: "tree node", id: id.to_string() });
        };
        if kind != ObjectKind::Node || NodeId::of(&bytes) != *id {
            return Err(damage_at(location)(FormatError::Hash));
        }
        StreamNode::decode(&bytes).map(Arc::new).map_err(damage_at(location))
    }
}
