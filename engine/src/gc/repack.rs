//! Moving what lives in a pack to another one. Frames that live whole are
//! taken over byte for byte; of others the living objects are gathered.
//! Everything is verified on the way.

use crate::depot::Depot;
use crate::error::{FormatError, StoreError};
use crate::id::{ObjectKey, PackId};
use crate::ledger::Bits;
use crate::pack::frame::{self, EncodedFrame};
use crate::pack::pieces::PieceFrame;
use crate::pack::{Frame, FrameKind, FrameSpan, PackWriter, object, scan};
use crate::settings::Settings;
use crate::units::{to_u32, to_usize};

/// What copying took.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Copied {
    pub(super) read_bytes: u64,
}

/// Objects that wait until they fill a frame.
struct Gathered {
    kind: FrameKind,
    plain: Vec<u8>,
    keys: Vec<ObjectKey>,
    /// Instead of both, in a frame of pieces.
    pieces: PieceFrame,
}

fn empty(kind: FrameKind) -> Gathered {
    Gathered { kind, plain: Vec::new(), keys: Vec::new(), pieces: PieceFrame::default() }
}

/// Appends what lives in `pack` to `writer`.
pub(super) fn copy_live(
    depot: &Depot,
    needed: &Bits,
    pack: PackId,
    writer: &mut PackWriter,
    settings: &Settings,
) -> Result<Copied, StoreError> {
    let mut copied = Copied::default();
    let directory = depot.directory(pack)?;
    let file = depot.file(pack)?;
    let mut parts =
        [FrameKind::Pages, FrameKind::Objects, FrameKind::Catalog, FrameKind::Pieces].map(empty);
    for span in &directory.frames {
        let first = to_usize(u64::from(span.first.0));
        let keys = &directory.keys[first..first + to_usize(u64::from(span.count))];
        let live: Vec<bool> =
            (first..first + keys.len()).map(|entry| needed.contains(entry)).collect();
        if !live.contains(&true) {
            continue;
        }
        let len = to_usize(u64::from(span.len));
        let bytes = file.read_at(span.offset, len).map_err(StoreError::io("read", &pack.path()))?;
        copied.read_bytes += u64::from(span.len);
        let damaged = |source| StoreError::Damaged { pack, offset: span.offset, source };
        let plain = verified(&bytes, span, keys).map_err(damaged)?;
        if !live.contains(&false) {
            let (keys, lens) = (keys.to_vec(), directory.piece_lens(span));
            writer.append(&EncodedFrame { kind: span.kind, bytes, keys, lens })?;
            continue;
        }
        let Some(part) = parts.iter_mut().find(|part| part.kind == span.kind) else { continue };
        for slot in (0..keys.len()).filter(|slot| live[*slot]) {
            part.add(&plain, slot, keys[slot], writer, settings).map_err(|error| match error {
                Failure::Format(source) => damaged(source),
                Failure::Store(error) => error,
            })?;
        }
    }
    parts.iter_mut().try_for_each(|part| part.flush(writer, settings))?;
    Ok(copied)
}

enum Failure {
    Format(FormatError),
    Store(StoreError),
}

fn verified(bytes: &[u8], span: &FrameSpan, keys: &[ObjectKey]) -> Result<Frame, FormatError> {
    let frame = frame::decode(bytes)?;
    if frame.kind == span.kind && scan::keys_of(&frame)? == keys {
        Ok(frame)
    } else {
        Err(FormatError::Hash)
    }
}

impl Gathered {
    fn add(
        &mut self,
        frame: &Frame,
        slot: usize,
        key: ObjectKey,
        writer: &mut PackWriter,
        settings: &Settings,
    ) -> Result<(), Failure> {
        let mut plain = Vec::new();
        match self.kind {
            FrameKind::Pages | FrameKind::Pieces => {
                let chunk = frame.chunk(to_u32(slot)).ok_or(FormatError::Short);
                plain.extend_from_slice(chunk.map_err(Failure::Format)?);
            }
            FrameKind::Objects | FrameKind::Catalog => {
                let found = frame.object(to_u32(slot)).and_then(|it| it.ok_or(FormatError::Short));
                let found = found.map_err(Failure::Format)?;
                object::put(&mut plain, found.kind, found.bytes);
            }
        }
        let len_max = settings.frame_len_max;
        if self.plain.len() + plain.len() > len_max || !self.pieces.has_room(&plain, len_max) {
            self.flush(writer, settings).map_err(Failure::Store)?;
        }
        if self.kind == FrameKind::Pieces {
            self.pieces.push(key, &plain);
        } else {
            self.plain.extend_from_slice(&plain);
            self.keys.push(key);
        }
        Ok(())
    }

    fn flush(&mut self, writer: &mut PackWriter, settings: &Settings) -> Result<(), StoreError> {
        let others = (std::mem::take(&mut self.plain), std::mem::take(&mut self.keys));
        let (plain, keys) = self.pieces.take().unwrap_or(others);
        if keys.is_empty() {
            return Ok(());
        }
        writer.append(&frame::encode(self.kind, &plain, keys, settings.zstd_level))
    }
}
