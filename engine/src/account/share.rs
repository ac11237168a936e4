//! The part of a frame's stored bytes that an object answers for.

use crate::depot::{Depot, Location};
use crate::error::StoreError;
use crate::id::PackId;
use crate::pack::object::OBJECT_HEADER_LEN;
use crate::pack::{EntryNo, FrameKind, object};
use crate::units::{PAGE_LEN, to_u64, to_usize};

/// Where an object is kept and what it takes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) pack: PackId,
    pub(super) bytes: u32,
}

/// What one object takes.
pub(super) fn share_of(depot: &Depot, at: &Location) -> Result<Share, StoreError> {
    let (begin, end, all) = match at.span.kind {
        FrameKind::Pages => {
            let page = to_u64(PAGE_LEN);
            let slot = u64::from(at.slot);
            (slot * page, (slot + 1) * page, u64::from(at.span.count) * page)
        }
        FrameKind::Pieces => piece_range(depot, at)?,
        FrameKind::Objects | FrameKind::Catalog => plain_range(depot, at)?,
    };
    Ok(Share { pack: at.pack, bytes: split(at.span.len, begin, end, all) })
}

/// Plaintext bytes of an object if it is a chunk, else nothing.
pub(super) fn chunk_len(depot: &Depot, at: &Location) -> Result<u64, StoreError> {
    match at.span.kind {
        FrameKind::Pieces => {
            let entry = EntryNo(at.span.first.0 + at.slot);
            Ok(depot.directory(at.pack)?.chunk_len(&at.span, entry))
        }
        FrameKind::Pages => Ok(to_u64(PAGE_LEN)),
        FrameKind::Objects | FrameKind::Catalog => Ok(0),
    }
}

/// The tables of the pack have the lengths, so that no frame is read.
fn piece_range(depot: &Depot, at: &Location) -> Result<(u64, u64, u64), StoreError> {
    let lens = depot.directory(at.pack)?.piece_lens(&at.span);
    let sum = |lens: &[u32]| lens.iter().copied().map(u64::from).sum::<u64>();
    let slot = to_usize(u64::from(at.slot)).min(lens.len());
    let end = (slot + 1).min(lens.len());
    Ok((sum(&lens[..slot]), sum(&lens[..end]), sum(&lens)))
}

fn plain_range(depot: &Depot, at: &Location) -> Result<(u64, u64, u64), StoreError> {
    let frame = depot.frame(at.pack, &at.span)?;
    let objects = object::list(&frame).map_err(|source| StoreError::Damaged {
        pack: at.pack,
        offset: at.span.offset,
        source,
    })?;
    let len = |object: &object::Object<'_>| to_u64(OBJECT_HEADER_LEN + object.bytes.len());
    let slot = to_usize(u64::from(at.slot));
    let begin = objects.iter().take(slot).map(len).sum::<u64>();
    let own = objects.get(slot).map_or(0, len);
    Ok((begin, begin + own, objects.iter().map(len).sum()))
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
