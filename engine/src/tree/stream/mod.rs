//! Trees of byte streams: the canonical merkle list of chunks.
//!
//! A leaf lists chunks, a node above lists nodes, each with the bytes that it
//! covers. A node ends where the id of its last child says so, so an insertion
//! changes the nodes on one path and moves no others. Every level is grouped
//! from its beginning; the first level that is one node is the top.

pub(crate) mod build;
mod diff;
pub(crate) mod node;
pub(crate) mod walk;

pub(crate) use build::{StreamBuilder, StreamSink};
pub(crate) use diff::diff;
pub(crate) use node::StreamNode;
#[cfg(test)]
pub(crate) use node::sample_node;
pub(crate) use walk::{Piece, Seat, StreamSource, top, walk};

/// A node has at least this many children, unless it is the last of its level.
pub(crate) const CHILDREN_MIN: usize = 4;
/// A node has at most this many children.
pub(crate) const CHILDREN_MAX: usize = 256;
/// Highest level: 2^44 bytes in chunks of 4 KiB, 4 to a node.
pub(crate) const STREAM_LEVEL_MAX: u8 = 15;
/// A child whose id has at least this as its last byte ends its node: one in
/// 64. Zeros, which stand for zeros, never do.
const END_FROM: u8 = 252;

/// Whether a node with so many children, of which this is the last, ends.
pub(crate) fn ends_node(children: usize, last: &[u8; 32]) -> bool {
    children == CHILDREN_MAX || (children >= CHILDREN_MIN && last[31] >= END_FROM)
}
