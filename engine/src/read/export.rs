//! Export: an image back into a file, holes and all.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::unix::fs::FileExt;

use super::image::ImageReader;
use super::pipeline::{ReadPage, read_through};
use super::stream;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::tree::{RootRecord, Splitter};
use crate::units::{PAGE_LEN, page_offset, to_u64, to_usize};

/// Writes every byte of an image into an empty file; zeros become holes.
pub(crate) fn export(
    depot: &Depot,
    root: &RootRecord,
    out: &File,
    progress: &mut dyn FnMut(u64),
) -> Result<(), StoreError> {
    out.set_len(0).map_err(StoreError::transfer("cut the output"))?;
    out.set_len(root.len).map_err(StoreError::transfer("set the length of the output"))?;
    if root.splitter == Splitter::FastCdc16K {
        return stream::export(depot, root, out, progress);
    }
    read_through(depot, root, &mut |batch| {
        write_pages(&batch.pages, root.len, out)?;
        progress(page_offset(batch.pages_done).min(root.len));
        Ok(())
    })
}

/// Bytes of an image read at once.
const POUR_LEN: usize = 4 << 20;

/// Writes every byte of an image one behind the other.
pub(crate) fn pour(
    image: &mut ImageReader,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
) -> Result<(), StoreError> {
    let mut buffer = vec![0; POUR_LEN];
    let mut done = 0;
    while done < image.len() {
        let count = image.read_at(done, &mut buffer)?;
        out.write_all(&buffer[..count]).map_err(StoreError::transfer("write the output"))?;
        done += to_u64(count);
        progress(done);
    }
    out.flush().map_err(StoreError::transfer("write the output"))
}

/// Pages written with one call.
const RUN_PAGES_MAX: usize = 256;

/// Writes pages out of the frames in which they lie, neighbours with one call.
fn write_pages(pages: &[ReadPage], len: u64, out: &File) -> Result<(), StoreError> {
    for run in pages.chunk_by(|one, next| one.page + 1 == next.page) {
        for part in run.chunks(RUN_PAGES_MAX) {
            write_run(part, len, out)?;
        }
    }
    Ok(())
}

fn write_run(run: &[ReadPage], len: u64, out: &File) -> Result<(), StoreError> {
    let Some(first) = run.first() else { return Ok(()) };
    let start = page_offset(first.page);
    let mut parts: Vec<&[u8]> = Vec::with_capacity(run.len());
    for page in run {
        let rest = to_usize((len - page_offset(page.page)).min(to_u64(PAGE_LEN)));
        parts.push(&page.bytes()?[..rest]);
    }
    let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let failed = StoreError::transfer("write the output");
    let written = match rustix::io::pwritev(out, &slices, start) {
        Ok(written) => written,
        Err(rustix::io::Errno::INTR) => 0,
        Err(error) => return Err(failed(error.into())),
    };
    write_rest(&parts, written, start, out).map_err(failed)
}

/// What one call did not write.
fn write_rest(parts: &[&[u8]], written: usize, start: u64, out: &File) -> std::io::Result<()> {
    let mut at = 0;
    for part in parts {
        let done = written.saturating_sub(at).min(part.len());
        if done < part.len() {
            out.write_all_at(&part[done..], start + to_u64(at + done))?;
        }
        at += part.len();
    }
    Ok(())
}
