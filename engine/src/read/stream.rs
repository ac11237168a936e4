//! Reading byte streams: which chunks have the bytes asked for, where they
//! lie, and their verified bytes.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rayon::prelude::*;

use super::map::FrameRef;
use crate::depot::{Depot, Location, Locator};
use crate::error::{FormatError, ReadCause, ReadError, StoreError};
use crate::id::{ChunkId, ObjectKey, PackId};
use crate::io::DiskFile;
use crate::pack::frame::{self, Frame};
use crate::tree::RootRecord;
use crate::tree::stream::{Piece, walk};
use crate::units::{to_u64, to_usize};

/// Bytes of a stream that are looked up and decoded together.
const WINDOW_LEN: u64 = 4 << 20;

/// A chunk and its verified bytes; zeros have none.
#[derive(Debug)]
pub(super) struct ReadPiece {
    pub(super) piece: Piece,
    pub(super) bytes: Vec<u8>,
}

/// A chunk and where it lies; zeros lie nowhere.
type Placed = (Piece, Option<(ChunkId, FrameRef, u32)>);

/// The chunks of a range, with the packs in which they lie held open, so that
/// a collection which retires a pack meanwhile changes nothing.
struct Window {
    pieces: Vec<Placed>,
    packs: BTreeMap<PackId, Arc<dyn DiskFile>>,
}

impl Window {
    fn open(depot: &Depot, root: &RootRecord, range: &Range<u64>) -> Result<Self, StoreError> {
        depot.following(|| {
            let mut found = Vec::new();
            walk(depot, root, range, &mut |piece| {
                found.push(piece);
                Ok(())
            })?;
            let chunks: Vec<ChunkId> = found.iter().filter_map(|piece| piece.chunk).collect();
            let keys: Vec<ObjectKey> = chunks.iter().map(ChunkId::key).collect();
            let mut places = Locator::new(depot).locate(&keys)?.into_iter().map(frame_of);
            let place = |piece: Piece| {
                let at = piece.chunk.zip(piece.chunk.and_then(|_| places.next()));
                (piece, at.map(|(chunk, (frame, slot))| (chunk, frame, slot)))
            };
            let pieces: Vec<Placed> = found.into_iter().map(place).collect();
            let packs = packs_of(depot, &pieces)?;
            Ok(Self { pieces, packs })
        })
    }

    /// All chunks, each frame read once if its chunks are neighbours.
    fn read(&self) -> Result<Vec<ReadPiece>, StoreError> {
        let frame_of = |placed: &Placed| placed.1.map(|(_, frame, _)| frame);
        let runs: Vec<&[Placed]> =
            self.pieces.chunk_by(|one, next| frame_of(one) == frame_of(next)).collect();
        let read: Vec<Vec<ReadPiece>> =
            runs.into_par_iter().map(|run| self.read_run(run)).collect::<Result<_, _>>()?;
        Ok(read.into_iter().flatten().collect())
    }

    fn read_run(&self, run: &[Placed]) -> Result<Vec<ReadPiece>, StoreError> {
        let Some((_, Some((chunk, at, _)))) = run.first() else {
            let zeros = run.iter().map(|(piece, _)| ReadPiece { piece: *piece, bytes: Vec::new() });
            return Ok(zeros.collect());
        };
        let frame = self.frame(at).map_err(failed(*chunk, at))?;
        let read = |(piece, place): &Placed| {
            let bytes = match place {
                Some((chunk, at, slot)) => {
                    verified(&frame, *slot, chunk, piece.len).map_err(failed(*chunk, at))?.to_vec()
                }
                None => Vec::new(),
            };
            Ok(ReadPiece { piece: *piece, bytes })
        };
        run.iter().map(read).collect()
    }

    fn frame(&self, at: &FrameRef) -> Result<Frame, ReadCause> {
        if *at == FrameRef::NOWHERE {
            return Err(ReadCause::Lost);
        }
        let file = self.packs.get(&at.pack).ok_or(ReadCause::UnknownPack)?;
        Ok(frame::decode(&file.read_at(at.offset, to_usize(u64::from(at.len)))?)?)
    }
}

fn frame_of(location: Option<Location>) -> (FrameRef, u32) {
    location.map_or((FrameRef::NOWHERE, 0), |Location { pack, span, slot }| {
        (FrameRef { pack, offset: span.offset, len: span.len, count: span.count }, slot)
    })
}

fn packs_of(
    depot: &Depot,
    pieces: &[Placed],
) -> Result<BTreeMap<PackId, Arc<dyn DiskFile>>, StoreError> {
    let mut packs = BTreeMap::new();
    for (_, at, _) in pieces.iter().filter_map(|(_, place)| place.as_ref()) {
        if *at == FrameRef::NOWHERE || packs.contains_key(&at.pack) {
            continue;
        }
        match depot.file(at.pack) {
            Ok(file) => drop(packs.insert(at.pack, file)),
            Err(error @ StoreError::Retired { .. }) => return Err(error),
            // Who needs a chunk of it is told why it cannot be had.
            Err(error) => tracing::debug!(pack = %at.pack, %error, "a pack cannot be opened"),
        }
    }
    Ok(packs)
}

fn failed(chunk: ChunkId, at: &FrameRef) -> impl Fn(ReadCause) -> StoreError {
    let (pack, offset) = (at.pack, at.offset);
    move |cause| ReadError { chunk, pack, offset, cause }.into()
}

/// The chunk in a slot, if it is the one that it should be.
fn verified<'f>(
    frame: &'f Frame,
    slot: u32,
    chunk: &ChunkId,
    len: u64,
) -> Result<&'f [u8], ReadCause> {
    let bytes = frame.chunk(slot).ok_or(FormatError::Field("slot"))?;
    let found = ChunkId::of(bytes);
    if found != *chunk {
        return Err(ReadCause::Mismatch { found });
    }
    if to_u64(bytes.len()) == len { Ok(bytes) } else { Err(FormatError::Field("length").into()) }
}

/// Reads a stream at any offset. The chunks of one window stay in memory, so
/// reading on is cheap.
#[derive(Debug)]
pub(super) struct StreamReader {
    /// Neighbouring chunks.
    window: Vec<ReadPiece>,
    /// As many bytes as are fetched next; more for who reads on.
    fetch_len: u64,
}

/// Bytes fetched around an offset that nobody read up to.
const FETCH_LEN_MIN: u64 = 64 << 10;

impl StreamReader {
    pub(super) fn new() -> Self {
        Self { window: Vec::new(), fetch_len: FETCH_LEN_MIN }
    }

    /// Fills `out` from `offset` on; all of it lies in the stream.
    pub(super) fn read_at(
        &mut self,
        depot: &Depot,
        root: &RootRecord,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), StoreError> {
        let mut done = 0;
        while done < out.len() {
            let at = offset + to_u64(done);
            if !self.covers(at) {
                self.fetch(depot, root, at)?;
            }
            let copied = self.copy(at, &mut out[done..]);
            if copied == 0 {
                return Err(StoreError::Invalid("the tree of the stream has a gap"));
            }
            done += copied;
        }
        Ok(())
    }

    fn end(&self) -> Option<u64> {
        self.window.last().map(|last| last.piece.offset + last.piece.len)
    }

    fn covers(&self, at: u64) -> bool {
        let begins = self.window.first().is_some_and(|first| first.piece.offset <= at);
        begins && self.end().is_some_and(|end| at < end)
    }

    fn fetch(&mut self, depot: &Depot, root: &RootRecord, at: u64) -> Result<(), StoreError> {
        self.fetch_len = if self.end() == Some(at) {
            (self.fetch_len * 4).min(WINDOW_LEN)
        } else {
            FETCH_LEN_MIN
        };
        self.window.clear();
        let range = at..at.saturating_add(self.fetch_len).min(root.len);
        self.window = Window::open(depot, root, &range)?.read()?;
        Ok(())
    }

    /// Copies from the window; returns how much.
    fn copy(&self, offset: u64, out: &mut [u8]) -> usize {
        let begin =
            self.window.partition_point(|read| read.piece.offset + read.piece.len <= offset);
        let mut done = 0;
        for ReadPiece { piece, bytes } in &self.window[begin..] {
            let Some(inside) = (offset + to_u64(done)).checked_sub(piece.offset) else { break };
            let count = to_usize((piece.len - inside).min(to_u64(out.len() - done)));
            let part = &mut out[done..done + count];
            match piece.chunk {
                Some(_) => {
                    let inside = to_usize(inside);
                    part.copy_from_slice(&bytes[inside..inside + count]);
                }
                None => part.fill(0),
            }
            done += count;
        }
        done
    }
}

/// Writes every byte of a stream into an empty file; zeros become holes.
pub(super) fn export(
    depot: &Depot,
    root: &RootRecord,
    out: &File,
    progress: &mut dyn FnMut(u64),
) -> Result<(), StoreError> {
    let mut start = 0;
    while start < root.len {
        let end = (start + WINDOW_LEN).min(root.len);
        for ReadPiece { piece, bytes } in Window::open(depot, root, &(start..end))?.read()? {
            // A chunk across the border of two windows is written by the first.
            if piece.offset >= start || start == 0 {
                out.write_all_at(&bytes, piece.offset)
                    .map_err(StoreError::transfer("write the output"))?;
            }
        }
        start = end;
        progress(start);
    }
    Ok(())
}
