//! The first two passes: packs frame by frame, and the index entry by entry.

use rayon::prelude::*;

use super::CheckScope;
use super::report::{Findings, describe};
use crate::depot::Depot;
use crate::error::{FormatError, StoreError};
use crate::id::{ObjectKey, PackId};
use crate::index::Place;
use crate::io::DiskFile;
use crate::pack::directory::{PACK_HEADER_LEN, content_hasher};
use crate::pack::{Directory, FrameSpan, frame, scan};
use crate::units::{to_u64, to_usize};

/// Frames read before they are hashed on all cores.
const BATCH_FRAMES: usize = 128;
/// Index entries gathered before they are compared, so that they can be
/// sorted by pack.
const BATCH_ENTRIES: usize = 1 << 18;

/// Reads a whole pack.
pub(super) fn check_pack(
    depot: &Depot,
    pack: PackId,
    scope: CheckScope,
    findings: &mut Findings,
    progress: &mut dyn FnMut(u64),
) -> Result<(), StoreError> {
    let file = match depot.file(pack) {
        Ok(file) => file,
        Err(error) => {
            findings.bad_pack(pack, None, with_cause(&error));
            return Ok(());
        }
    };
    if let Err(error) = scan::check_header(&*file, pack) {
        findings.bad_pack(pack, Some(0), error.to_string());
    }
    let listing = match scan::list(&*file, pack) {
        Ok(listing) => listing,
        Err(error) => {
            findings.bad_pack(pack, None, with_cause(&error));
            return Ok(());
        }
    };
    if let Some(damage) = listing.damage {
        let problem = format!("the tables of the pack are damaged: {damage}");
        findings.bad_pack(pack, Some(listing.directory.content_len), problem);
    }
    let mut hasher = content_hasher();
    hasher.update(&file.read_at(0, PACK_HEADER_LEN).unwrap_or_default());
    let bad_before = findings.report.damages.len();
    let mut bad_frames = 0;
    for batch in listing.directory.frames.chunks(BATCH_FRAMES) {
        let covered: Vec<FrameSpan> =
            batch.iter().filter(|span| scope.covers(pack, span)).copied().collect();
        findings.report.skipped_frames += to_u64(batch.len() - covered.len());
        bad_frames +=
            check_frames(&*file, pack, &listing.directory, &covered, &mut hasher, findings);
        progress(batch.iter().map(|span| u64::from(span.len)).sum());
    }
    let wrong_hash = listing.content_hash.is_some_and(|hash| hasher.finalize() != hash);
    if scope.is_whole()
        && wrong_hash
        && bad_frames == 0
        && findings.report.damages.len() == bad_before
    {
        findings.bad_pack(pack, None, "the content hash of the pack does not match".to_owned());
    }
    Ok(())
}

/// Reads some frames; returns how many are bad.
fn check_frames(
    file: &dyn DiskFile,
    pack: PackId,
    directory: &Directory,
    spans: &[FrameSpan],
    hasher: &mut blake3::Hasher,
    findings: &mut Findings,
) -> usize {
    let read = |span: &FrameSpan| file.read_at(span.offset, to_usize(u64::from(span.len)));
    let frames: Vec<_> = spans.iter().map(|span| (span, read(span))).collect();
    for (_, bytes) in &frames {
        hasher.update(bytes.as_deref().unwrap_or_default());
    }
    let verdicts: Vec<Result<(), String>> = frames
        .into_par_iter()
        .map(|(span, bytes)| {
            let bytes = bytes.map_err(|error| format!("it cannot be read: {error}"))?;
            check_frame(&bytes, span, directory).map_err(|error| error.to_string())
        })
        .collect();
    let mut bad = 0;
    for (span, verdict) in spans.iter().zip(verdicts) {
        findings.report.frames += 1;
        match verdict {
            Ok(()) if span.kind.holds_chunks() => {
                findings.report.chunks += u64::from(span.count);
            }
            Ok(()) => {}
            Err(error) => {
                bad += 1;
                let problem = format!("{} is damaged: {error}", describe(span.kind));
                findings.bad_frame(pack, span.offset, problem, own_keys(directory, span));
            }
        }
    }
    bad
}

fn own_keys<'d>(directory: &'d Directory, span: &FrameSpan) -> &'d [ObjectKey] {
    let first = to_usize(u64::from(span.first.0));
    &directory.keys[first..first + to_usize(u64::from(span.count))]
}

/// A frame must be sound and hold exactly the objects that the pack lists.
fn check_frame(bytes: &[u8], span: &FrameSpan, directory: &Directory) -> Result<(), FormatError> {
    let frame = frame::decode(bytes)?;
    if frame.kind != span.kind || frame.count != span.count {
        return Err(FormatError::Field("frame table"));
    }
    if frame.lens()? != directory.piece_lens(span) {
        return Err(FormatError::Field("piece table"));
    }
    if scan::keys_of(&frame)? == own_keys(directory, span) {
        Ok(())
    } else {
        Err(FormatError::Hash)
    }
}

/// Every entry must name an object that its pack lists under the same key.
pub(super) fn check_index(depot: &Depot, findings: &mut Findings) -> Result<(), StoreError> {
    let mut waiting: Vec<(Place, ObjectKey)> = Vec::new();
    depot.index().for_each(&mut |key, place| {
        waiting.push((place, key));
        if waiting.len() < BATCH_ENTRIES {
            return Ok(());
        }
        compare(depot, &mut waiting, findings)
    })?;
    compare(depot, &mut waiting, findings)
}

fn compare(
    depot: &Depot,
    waiting: &mut Vec<(Place, ObjectKey)>,
    findings: &mut Findings,
) -> Result<(), StoreError> {
    waiting.sort_unstable();
    for group in waiting.chunk_by(|(one, _), (next, _)| one.pack == next.pack) {
        let Some((Place { pack, .. }, _)) = group.first() else { continue };
        let wrong = match depot.directory(*pack) {
            Ok(directory) => {
                group.iter().filter(|(place, key)| directory.key(place.entry) != Some(*key)).count()
            }
            Err(error) if error.kind() == crate::error::ErrorKind::Internal => return Err(error),
            Err(_) => group.len(),
        };
        if wrong > 0 {
            let problem = format!("{wrong} index entries name objects that the pack does not list");
            findings.bad_pack(*pack, None, problem);
        }
    }
    waiting.clear();
    Ok(())
}

fn with_cause(error: &StoreError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
