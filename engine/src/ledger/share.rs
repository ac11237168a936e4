//! The part of a frame's stored bytes that an object answers for.

use crate::depot::{Depot, Location};
use crate::error::StoreError;
use crate::id::PackId;
use crate::pack::object::OBJECT_HEADER_LEN;
use crate::pack::{EntryNo, FrameKind, FrameSpan, object};
use crate::units::{PAGE_LEN, to_u64, to_usize};

/// Where an object is kept and what it takes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) pack: PackId,
    pub(crate) bytes: u32,
}

/// What one object takes.
pub(crate) fn share_of(depot: &Depot, at: &Location) -> Result<Share, StoreError> {
    let slot = to_usize(u64::from(at.slot));
    let (begin, end, all) = match at.span.kind {
        FrameKind::Pages => {
            let page = to_u64(PAGE_LEN);
            let slot = u64::from(at.slot);
            (slot * page, (slot + 1) * page, u64::from(at.span.count) * page)
        }
        FrameKind::Pieces | FrameKind::Objects | FrameKind::Catalog => {
            let lens = lens(depot, at.pack, &at.span)?;
            let begin = lens.iter().take(slot).sum::<u64>();
            (begin, begin + lens.get(slot).copied().unwrap_or(0), lens.iter().sum())
        }
    };
    Ok(Share { pack: at.pack, bytes: split(at.span.len, begin, end, all) })
}

/// Plaintext bytes of an object if it is a chunk, else nothing.
pub(crate) fn chunk_len(depot: &Depot, at: &Location) -> Result<u64, StoreError> {
    match at.span.kind {
        FrameKind::Pieces => {
            let entry = EntryNo(at.span.first.0 + at.slot);
            Ok(depot.directory(at.pack)?.chunk_len(&at.span, entry))
        }
        FrameKind::Pages => Ok(to_u64(PAGE_LEN)),
        FrameKind::Objects | FrameKind::Catalog => Ok(0),
    }
}

/// What each object of a frame takes, in their order.
pub(crate) fn split_span(
    depot: &Depot,
    pack: PackId,
    span: &FrameSpan,
) -> Result<Vec<u32>, StoreError> {
    let lens = lens(depot, pack, span)?;
    let all = lens.iter().sum();
    let mut begin = 0;
    let share = |len: u64| {
        begin += len;
        split(span.len, begin - len, begin, all)
    };
    Ok(lens.into_iter().map(share).collect())
}

/// Plaintext bytes of the objects of a frame. Only frames of nodes and records
/// are read for it: of others the tables of the pack say it.
fn lens(depot: &Depot, pack: PackId, span: &FrameSpan) -> Result<Vec<u64>, StoreError> {
    match span.kind {
        FrameKind::Pages => return Ok(vec![to_u64(PAGE_LEN); to_usize(u64::from(span.count))]),
        FrameKind::Pieces => {
            let lens = depot.directory(pack)?.piece_lens(span);
            return Ok(lens.into_iter().map(u64::from).collect());
        }
        FrameKind::Objects | FrameKind::Catalog => {}
    }
    let frame = depot.frame(pack, span)?;
    let damaged = |source| StoreError::Damaged { pack, offset: span.offset, source };
    let objects = object::list(&frame).map_err(damaged)?;
    Ok(objects.iter().map(|object| to_u64(OBJECT_HEADER_LEN + object.bytes.len())).collect())
}

/// Rounds the borders and not the parts, so that nothing is lost between them.
fn split(frame_len: u32, begin: u64, end: u64, all: u64) -> u32 {
    let border = |at: u64| (u64::from(frame_len) * at).checked_div(all).unwrap_or(0);
    u32::try_from(border(end) - border(begin)).expect("a part of a frame of 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        for (frame, parts) in [(1001, 16_u64), (97, 7), (5, 9)] {
            let all: u32 = (0..parts).map(|n| split(frame, n * 3, n * 3 + 3, parts * 3)).sum();
            assert_eq!(all, frame);
        }
    }
}
