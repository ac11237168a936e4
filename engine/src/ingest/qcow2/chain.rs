//! A qcow2 file and those that it is written over: where the upper one has
//! nothing, the next one shows.
//!
//! The files are given, never looked up by the names inside them. A chain has
//! a bounded length and no file twice.

use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::header;
use super::layer::{Found, Layer};
use crate::error::{Qcow2Error, StoreError};
use crate::ingest::import::{length_of, next_data};
use crate::units::{PAGE_LEN, to_u64, to_usize};

/// Files under the first one.
const BACKING_MAX: usize = 32;
/// Bytes of the disk gathered at once: whole pages, whatever the size of a
/// cluster.
const WINDOW_LEN: u64 = 64 << 10;

/// One file of a chain.
#[derive(Debug)]
enum Level<'f> {
    Qcow2(Box<Layer<'f>>),
    /// Byte for byte; the last one.
    Raw {
        file: &'f File,
        len: u64,
        /// The data that was found last.
        found: Option<Range<u64>>,
    },
}

/// All files, the first one on top.
#[derive(Debug)]
pub(in crate::ingest) struct Chain<'f> {
    levels: Vec<Level<'f>>,
    len: u64,
}

/// What the highest file that says anything says about a place.
struct Next {
    range: Range<u64>,
    has_data: bool,
}

impl<'f> Chain<'f> {
    /// Opens a qcow2 file over others, each over the next.
    pub(in crate::ingest) fn open(file: &'f File, backing: &'f [File]) -> Result<Self, StoreError> {
        if backing.len() > BACKING_MAX {
            return Err(Qcow2Error::ChainTooLong { max: BACKING_MAX }.into());
        }
        refuse_loops(file, backing)?;
        let mut files = backing.iter();
        let (mut levels, mut next) = (Vec::new(), Some((file, true)));
        while let Some((file, is_qcow2)) = next.take() {
            if !is_qcow2 {
                let len = length_of(file).map_err(StoreError::transfer("read input"))?;
                let len = len.ok_or(Qcow2Error::Header("backing file"))?;
                levels.push(Level::Raw { file, len, found: None });
                break;
            }
            let file_len = file.metadata().map_err(StoreError::transfer("read input"))?.len();
            let (header, over) = header::read(file, file_len)?;
            levels.push(Level::Qcow2(Box::new(Layer::open(file, file_len, header)?)));
            let Some(over) = over else { break };
            let lower = files.next().ok_or(Qcow2Error::Backing(over.name))?;
            next = Some((lower, over.is_qcow2.map_or_else(|| super::is_qcow2(lower), Ok)?));
        }
        if files.next().is_some() {
            return Err(Qcow2Error::NotOver.into());
        }
        let len = levels.first().map_or(0, Level::len);
        Ok(Self { levels, len })
    }

    /// Length of the disk in bytes.
    pub(in crate::ingest) fn len(&self) -> u64 {
        self.len
    }

    /// Hands over everything that is allocated anywhere, in the order of the
    /// disk: whole pages that do not overlap, the last one of the disk cut short.
    pub(in crate::ingest) fn for_each(
        &mut self,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut window = Vec::new();
        let mut at = 0;
        while let Some(next) = self.next(at)? {
            if !next.has_data {
                at = next.range.end;
                continue;
            }
            // What was handed over before are whole pages; what was passed by
            // since are zeros.
            let from = next.range.start;
            let start = from - from % to_u64(PAGE_LEN);
            let end = (start + WINDOW_LEN).min(self.len);
            window.clear();
            window.resize(to_usize(end - start), 0);
            self.fill(0, from, &mut window[to_usize(from - start)..])?;
            take(start, &window)?;
            at = end;
        }
        Ok(())
    }

    /// The next place that any file has something to say about. It ends where
    /// another file may say something else.
    fn next(&mut self, at: u64) -> Result<Option<Next>, StoreError> {
        let mut first: Option<Next> = None;
        for level in &mut self.levels {
            let Some(found) = level.seek(at)? else { continue };
            let start = found.range.start.max(at);
            if start >= self.len {
                continue;
            }
            let end = found.range.end;
            first = Some(match first {
                None => Next { range: start..end, has_data: found.has_data },
                Some(upper) if start < upper.range.start => {
                    Next { range: start..end.min(upper.range.start), has_data: found.has_data }
                }
                // Zeros end where others have data that they do not cover.
                Some(upper) => upper,
            });
        }
        Ok(first)
    }

    /// Fills `out`, which holds zeros, from this level on.
    fn fill(&mut self, depth: usize, at: u64, out: &mut [u8]) -> Result<(), StoreError> {
        let Some(level) = self.levels.get_mut(depth) else { return Ok(()) };
        let len = to_usize(level.len().saturating_sub(at).min(to_u64(out.len())));
        let mut done = 0;
        while done < len {
            let here = at + to_u64(done);
            let level = &mut self.levels[depth];
            let found = level.seek(here)?.filter(|found| found.range.start < at + to_u64(len));
            let covered = found.as_ref().is_some_and(|found| found.range.start <= here);
            let end = match &found {
                Some(found) if covered => found.range.end,
                Some(found) => found.range.start,
                None => at + to_u64(len),
            };
            let part_end = len.min(to_usize(end - at));
            let part = &mut out[done..part_end];
            match found {
                Some(found) if covered => {
                    if found.has_data {
                        level.read(&found, here, part)?;
                    }
                }
                _ => self.fill(depth + 1, here, part)?,
            }
            done = part_end;
        }
        Ok(())
    }
}

impl Level<'_> {
    fn len(&self) -> u64 {
        match self {
            Self::Qcow2(layer) => layer.len(),
            Self::Raw { len, .. } => *len,
        }
    }

    /// The first place that ends behind `at` and has something.
    fn seek(&mut self, at: u64) -> Result<Option<Found>, StoreError> {
        match self {
            Self::Qcow2(layer) => layer.seek(at),
            Self::Raw { file, len, found } => {
                if at >= *len {
                    return Ok(None);
                }
                let range = match found {
                    Some(range) if range.end > at => range.clone(),
                    _ => next_data(file, at, *len).map_err(StoreError::transfer("read input"))?,
                };
                *found = Some(range.clone());
                Ok((range.start < *len).then(|| Found::data(range)))
            }
        }
    }

    /// Copies a part of what was found.
    fn read(&mut self, found: &Found, at: u64, out: &mut [u8]) -> Result<(), StoreError> {
        match self {
            Self::Qcow2(layer) => layer.read(found, at, out),
            Self::Raw { file, .. } => {
                file.read_exact_at(out, at).map_err(StoreError::transfer("read input"))
            }
        }
    }
}

fn refuse_loops(file: &File, backing: &[File]) -> Result<(), StoreError> {
    let mut seen = HashSet::new();
    for file in std::iter::once(file).chain(backing) {
        let metadata = file.metadata().map_err(StoreError::transfer("read input"))?;
        if !seen.insert((metadata.dev(), metadata.ino())) {
            return Err(Qcow2Error::Loop.into());
        }
    }
    Ok(())
}
