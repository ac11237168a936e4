//! Export: an image back into a file, holes and all.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use rayon::prelude::*;

use super::image::ImageReader;
use super::map::Location;
use super::page_reader::{verified, verified_all};
use super::stream;
use super::window::{Window, fail};
use crate::chunk::Page;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::tree::{RootRecord, Splitter};
use crate::units::{PAGE_LEN, page_offset, pages_of, to_u64, to_usize};

/// Pages exported together: 64 MiB of the image.
const WINDOW_PAGES: u64 = 1 << 14;
/// Pages decoded before they are written out: 4 MiB.
const BATCH_PAGES: usize = 1024;

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
    let pages = pages_of(root.len);
    let mut start = 0;
    while start < pages {
        let range = start..(start + WINDOW_PAGES).min(pages);
        start = range.end;
        let window = Window::open(depot, root, &range)?;
        write_window(depot, &window, root.len, out)?;
        progress(page_offset(start).min(root.len));
    }
    Ok(())
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

fn write_window(depot: &Depot, window: &Window, len: u64, out: &File) -> Result<(), StoreError> {
    let pages: Vec<(u64, Location)> = window.map.stored(0..u64::MAX).collect();
    for batch in pages.chunks(BATCH_PAGES) {
        // Neighbouring pages of one frame are decoded together.
        let runs: Vec<&[(u64, Location)]> =
            batch.chunk_by(|(_, one), (_, next)| one.frame == next.frame).collect();
        let decoded: Vec<Vec<(u64, Page)>> = runs
            .into_par_iter()
            .map(|run| read_run(depot, window, run))
            .collect::<Result<_, _>>()?;
        write_pages(decoded.iter().flatten(), len, out)?;
    }
    Ok(())
}

fn read_run(
    depot: &Depot,
    window: &Window,
    run: &[(u64, Location)],
) -> Result<Vec<(u64, Page)>, StoreError> {
    let Some((_, first)) = run.first() else { return Ok(Vec::new()) };
    let wanted: Vec<_> = run.iter().map(|(_, at)| (at.slot, at.chunk)).collect();
    let frame = window.frame(depot, &first.frame).ok();
    let found: Vec<Option<&Page>> = match &frame {
        Some(frame) => verified_all(frame, &wanted).into_iter().map(Result::ok).collect(),
        None => vec![None; run.len()],
    };
    let page = |((page, at), found): (&(u64, Location), Option<&Page>)| match found {
        Some(bytes) => Ok((*page, *bytes)),
        None => Ok((*page, read_again(depot, window, *page, at)?)),
    };
    run.iter().zip(found).map(page).collect()
}

/// A page that was not found where it was thought to lie.
fn read_again(
    depot: &Depot,
    window: &Window,
    page: u64,
    at: &Location,
) -> Result<Page, StoreError> {
    let found =
        window.frame(depot, &at.frame).and_then(|it| verified(&it, at.slot, &at.chunk).copied());
    match found {
        Ok(bytes) => Ok(bytes),
        Err(cause) => {
            let moved = window.elsewhere(depot, page, at, cause)?;
            Ok(*verified(&moved, 0, &at.chunk).map_err(|cause| fail(at, cause))?)
        }
    }
}

/// Writes pages, neighbours with one call.
fn write_pages<'p>(
    pages: impl Iterator<Item = &'p (u64, Page)>,
    len: u64,
    out: &File,
) -> Result<(), StoreError> {
    let mut run: Vec<u8> = Vec::new();
    let mut run_start = 0;
    let write = |start: u64, run: &[u8]| {
        let count = to_usize((len - start).min(to_u64(run.len())));
        out.write_all_at(&run[..count], start).map_err(StoreError::transfer("write the output"))
    };
    for (page, bytes) in pages {
        if run_start + to_u64(run.len()) != page_offset(*page) && !run.is_empty() {
            write(run_start, &run)?;
            run.clear();
        }
        if run.is_empty() {
            run_start = page_offset(*page);
        }
        run.extend_from_slice(bytes);
    }
    if run.is_empty() { Ok(()) } else { write(run_start, &run) }
}

const _: () = assert!(PAGE_LEN == 4096);
