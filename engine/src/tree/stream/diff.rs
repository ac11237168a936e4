//! Which bytes of two streams differ, offset by offset.
//!
//! Both trees are read from the left. What begins at the same offset with the
//! same id is skipped whole, so the cost follows the difference as long as the
//! streams stay aligned; behind an insertion all nodes are read. What differs
//! is told by chunks: an extent begins and ends where a chunk of one of them
//! does. Bytes behind the end of the shorter one differ.

use std::ops::Range;

use super::walk::{Piece, Seat, StreamSource, top};
use crate::error::StoreError;
use crate::tree::{ImageDiff, RootRecord};

/// A part of a stream that is next.
#[derive(Debug, Clone, Copy)]
enum Part {
    Node(Seat),
    Chunk(Piece),
}

impl Part {
    fn span(&self) -> Range<u64> {
        match self {
            Self::Node(seat) => seat.offset..seat.offset + seat.len,
            Self::Chunk(piece) => piece.offset..piece.offset + piece.len,
        }
    }

    /// Whether both are the same bytes at the same place.
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Node(one), Self::Node(other)) => {
                (one.id, one.level, one.offset) == (other.id, other.level, other.offset)
            }
            (Self::Chunk(one), Self::Chunk(other)) => one == other,
            _ => false,
        }
    }

    /// How much there is to look into.
    fn weight(&self) -> u64 {
        match self {
            Self::Node(seat) => seat.len,
            Self::Chunk(_) => 0,
        }
    }
}

/// What is left of a stream, the next part last.
struct Side<'s> {
    source: &'s dyn StreamSource,
    open: Vec<Part>,
}

impl<'s> Side<'s> {
    fn new(source: &'s dyn StreamSource, root: &RootRecord) -> Result<Self, StoreError> {
        let open = top(source, root)?.map(Part::Node).into_iter().collect();
        Ok(Self { source, open })
    }

    /// Takes everything away that ends at or before `at`.
    fn pass(&mut self, at: u64) {
        while self.open.last().is_some_and(|part| part.span().end <= at) {
            self.open.pop();
        }
    }

    /// Puts the children of the next part in its place, if it is a node.
    fn look_into(&mut self, found: &mut ImageDiff) -> Result<(), StoreError> {
        let Some(Part::Node(seat)) = self.open.last().copied() else { return Ok(()) };
        let node = seat.load(self.source)?;
        self.open.pop();
        found.nodes_walked += 1;
        if seat.level == 0 {
            self.open.extend(seat.pieces(&node).into_iter().rev().map(Part::Chunk));
        } else {
            self.open.extend(seat.below(&node).into_iter().rev().map(Part::Node));
        }
        Ok(())
    }
}

/// Compares two streams.
pub(crate) fn diff(
    source: &dyn StreamSource,
    one: &RootRecord,
    other: &RootRecord,
) -> Result<ImageDiff, StoreError> {
    let mut found = ImageDiff::of_units(1);
    if one == other {
        return Ok(found);
    }
    let (mut left, mut right) = (Side::new(source, one)?, Side::new(source, other)?);
    let both = one.len.min(other.len);
    let mut at = 0;
    while at < both {
        left.pass(at);
        right.pass(at);
        let (Some(a), Some(b)) = (left.open.last(), right.open.last()) else { break };
        if a.is_same(b) {
            at = a.span().end;
            continue;
        }
        match (*a, *b) {
            (Part::Chunk(a), Part::Chunk(b)) => {
                let end = (a.offset + a.len).min(b.offset + b.len).min(both);
                if a.chunk.is_some() || b.chunk.is_some() {
                    found.add(at..end);
                }
                at = end;
            }
            (a, b) => {
                // What is larger cannot be found whole in the other one.
                let (a, b) = (a.weight(), b.weight());
                if a >= b {
                    left.look_into(&mut found)?;
                }
                if b >= a {
                    right.look_into(&mut found)?;
                }
            }
        }
    }
    let longer = one.len.max(other.len);
    if both < longer {
        found.add(both..longer);
    }
    Ok(found)
}
