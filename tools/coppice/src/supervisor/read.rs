//! Some bytes of an image, for whoever does not want all of it.

use std::fs::File;
use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use coppice_engine::ImageReader;

use super::Supervisor;
use crate::rpc::{Part, ReadExtent, Reply};

/// Bytes read before they are written on.
const PIECE: u64 = 1 << 20;

impl Supervisor {
    /// Writes the extents one behind the other, and nothing if one of them is
    /// not in the image.
    pub(crate) fn read(
        &self,
        name: &str,
        part: Part,
        extents: &[ReadExtent],
        mut out: &File,
    ) -> Result<Reply> {
        let begun = Instant::now();
        let image = self.image_of(name, part)?;
        extents.iter().try_for_each(|extent| check(*extent, name, image.len))?;
        let mut reader = self.store.reader(&image)?;
        let mut piece = Vec::new();
        let mut bytes = 0;
        for extent in extents {
            copy(&mut reader, *extent, &mut piece, &mut out)?;
            bytes += extent.length;
        }
        Ok(Reply::Exported { bytes, seconds: begun.elapsed().as_secs_f64() })
    }
}

fn check(extent: ReadExtent, name: &str, len: u64) -> Result<()> {
    let ReadExtent { offset, length } = extent;
    let end = offset.checked_add(length);
    if end.is_none_or(|end| end > len) {
        bail!("{offset}:{length} is not in {name}, which has {len} bytes");
    }
    Ok(())
}

/// Copies one extent, which lies in the image, through `piece`.
fn copy(
    reader: &mut ImageReader,
    extent: ReadExtent,
    piece: &mut Vec<u8>,
    out: &mut impl Write,
) -> Result<()> {
    let mut done = 0;
    while done < extent.length {
        piece.resize(usize::try_from((extent.length - done).min(PIECE))?, 0);
        let count = reader.read_at(extent.offset + done, piece)?;
        ensure!(count > 0, "the image ends at byte {}", extent.offset + done);
        out.write_all(&piece[..count]).context("cannot write the output")?;
        done += u64::try_from(count)?;
    }
    Ok(())
}
