//! Moving what lives in a pack to another one. Frames that live whole are
//! taken over byte for byte; of others the living objects are gathered.
//! Everything is verified on the way.

use super::mark::Places;
use crate::depot::Depot;
use crate::error::{FormatError, StoreError};
use crate::id::{ObjectKey, PackId};
use crate::pack::frame::{self, EncodedFrame};
use crate::pack::{Frame, FrameKind, FrameSpan, PackWriter, object, scan};
use crate::settings::Settings;
use crate::units::{PAGE_LEN, to_usize};

/// Objects that wait until they fill a frame.
struct Gathered {
    kind: FrameKind,
    plain: Vec<u8>,
    keys: Vec<ObjectKey>,
}

/// Appends what lives in `pack` to `writer`.
pub(super) fn copy_live(
    depot: &Depot,
    needed: &Places,
    pack: PackId,
    writer: &mut PackWriter,
    settings: &Settings,
) -> Result<(), StoreError> {
    let directory = depot.directory(pack)?;
    let file = depot.file(pack)?;
    let empty = |kind| Gathered { kind, plain: Vec::new(), keys: Vec::new() };
    let mut parts = [FrameKind::Pages, FrameKind::Objects, FrameKind::Catalog].map(empty);
    for span in &directory.frames {
        let first = to_usize(u64::from(span.first.0));
        let keys = &directory.keys[first..first + to_usize(u64::from(span.count))];
        let live: Vec<bool> =
            (first..first + keys.len()).map(|entry| needed.contains(pack, entry)).collect();
        if !live.contains(&true) {
            continue;
        }
        let len = to_usize(u64::from(span.len));
        let bytes = file.read_at(span.offset, len).map_err(StoreError::io("read", &pack.path()))?;
        let damaged = |source| StoreError::Damaged { pack, offset: span.offset, source };
        let plain = verified(&bytes, span, keys).map_err(damaged)?;
        if !live.contains(&false) {
            writer.append(&EncodedFrame { kind: span.kind, bytes, keys: keys.to_vec() })?;
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
    parts.iter_mut().try_for_each(|part| part.flush(writer, settings))
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
        if self.kind == FrameKind::Pages {
            plain.extend_from_slice(&frame.plain[slot * PAGE_LEN..(slot + 1) * PAGE_LEN]);
        } else {
            let found = object::list(frame).map_err(Failure::Format)?[slot];
            object::put(&mut plain, found.kind, found.bytes);
        }
        if self.plain.len() + plain.len() > settings.frame_len_max {
            self.flush(writer, settings).map_err(Failure::Store)?;
        }
        self.plain.extend_from_slice(&plain);
        self.keys.push(key);
        Ok(())
    }

    fn flush(&mut self, writer: &mut PackWriter, settings: &Settings) -> Result<(), StoreError> {
        if self.keys.is_empty() {
            return Ok(());
        }
        let plain = std::mem::take(&mut self.plain);
        let keys = std::mem::take(&mut self.keys);
        writer.append(&frame::encode(self.kind, &plain, keys, settings.zstd_level))
    }
}
