//! Import: a file or stream becomes a named snapshot of one image.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Instant;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::Serialize;

use super::gather::BATCH_PAGES;
use super::qcow2::{self, Chain};
use super::{CommitOptions, ImageWriter, Progress, Session};
use crate::catalog::{Role, SnapshotRecord};
use crate::error::{Qcow2Error, StoreError};
use crate::id::{Name, Root, SnapshotId};
use crate::tree::ImageRef;
use crate::units::{PAGE_LEN, to_u64, to_usize};

/// Bytes read at once: what is hashed together.
const BUFFER_LEN: usize = BATCH_PAGES * PAGE_LEN;
/// Pieces of a file that are read before they are asked for.
const PIECES_AHEAD: usize = 2;

/// What an imported file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportKind {
    /// A raw disk.
    Disk,
    /// Any bytes.
    Stream,
}

/// How a disk lies in its file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DiskFormat {
    /// qcow2 if the file begins as such, else raw.
    #[default]
    Auto,
    /// Byte for byte.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// How to import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportOptions {
    /// What the file is.
    pub kind: ImportKind,
    /// How a disk lies in the file; streams are always taken as they are.
    pub format: DiskFormat,
    /// What the snapshot is called besides its name.
    pub commit: CommitOptions,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self { kind: ImportKind::Disk, format: DiskFormat::Auto, commit: CommitOptions::default() }
    }
}

/// What an import did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ImportReport {
    /// The name it got.
    pub name: Name,
    /// The id of the snapshot.
    pub id: SnapshotId,
    /// The root of the image.
    pub root: Root,
    /// Length of the image.
    pub logical_bytes: u64,
    /// Plaintext bytes that were stored for the first time.
    pub new_bytes: u64,
    /// Bytes added to packs.
    pub stored_bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

impl Session {
    /// Reads `input` and commits it under `name`.
    pub(crate) fn import(
        mut self,
        (input, backing): (&File, &[File]),
        name: Name,
        options: ImportOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<ImportReport, StoreError> {
        let begun = Instant::now();
        // Fails before the work, not after it.
        drop(self.catalog.reserve(Some(&name))?);
        let image = match options.kind {
            _ if !backing.is_empty() && !may_have_backing(input, &options)? => {
                return Err(Qcow2Error::NotOver.into());
            }
            ImportKind::Stream => self.import_stream(input, progress)?,
            ImportKind::Disk if is_qcow2(input, options.format)? => {
                self.import_qcow2(input, backing, progress)?
            }
            ImportKind::Disk => self.import_image(input, progress)?,
        };
        let role = match options.kind {
            ImportKind::Disk => Role::Disk(0),
            ImportKind::Stream => Role::Stream,
        };
        let record =
            SnapshotRecord { images: vec![(role, image)], config: Vec::new(), parent: None };
        let commit = CommitOptions { name: Some(name.clone()), ..options.commit };
        let committed = self.commit(&record, commit)?;
        Ok(ImportReport {
            name,
            id: committed.id,
            root: image.root,
            logical_bytes: committed.logical_bytes,
            new_bytes: committed.new_bytes,
            stored_bytes: committed.stored_bytes,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    /// Reads the disk in a qcow2 file into an image; what is not allocated in
    /// it is taken from the file that it is written over, which is the first of
    /// `backing` and may be written over the next, or skipped.
    ///
    /// # Errors
    /// If it is not such a file, needs other files than those given, or cannot
    /// be read or written.
    pub fn import_qcow2(
        &mut self,
        input: &File,
        backing: &[File],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<ImageRef, StoreError> {
        let mut disk = Chain::open(input, backing)?;
        let len = disk.len();
        let mut writer = self.image(len, None)?;
        let mut told = 0;
        disk.for_each(|at, bytes| {
            writer.write(at / to_u64(PAGE_LEN), bytes)?;
            let done = at + to_u64(bytes.len());
            if done - told >= to_u64(BUFFER_LEN) || done == len {
                told = done;
                progress(Progress { done, total: Some(len), new_bytes: writer.new_bytes() });
            }
            Ok(())
        })?;
        writer.finish()
    }

    /// Reads `input` from where it stands to its end, as a byte stream.
    ///
    /// # Errors
    /// If it cannot be read or the stream cannot be written.
    pub fn import_stream(
        &mut self,
        input: &File,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<ImageRef, StoreError> {
        let total = length_of(input).map_err(StoreError::transfer("read input"))?;
        let mut writer = self.stream();
        read_parts(
            input,
            total,
            &mut |part| {
                writer.append(part)?;
                Ok(writer.new_bytes())
            },
            progress,
        )?;
        writer.finish()
    }

    /// Reads `input` to its end into an image of pages; holes are skipped.
    ///
    /// # Errors
    /// If it cannot be read or the image cannot be written.
    pub fn import_image(
        &mut self,
        input: &File,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<ImageRef, StoreError> {
        match length_of(input).map_err(StoreError::transfer("read input"))? {
            Some(len) => {
                let mut writer = self.image(len, None)?;
                copy_file(input, len, &mut writer, progress)?;
                writer.finish()
            }
            None => {
                let mut writer = self.growing_image();
                read_parts(
                    input,
                    None,
                    &mut |part| {
                        writer.append(part)?;
                        Ok(writer.new_bytes())
                    },
                    progress,
                )?;
                writer.finish()
            }
        }
    }
}

/// Only a qcow2 disk is written over other files.
fn may_have_backing(input: &File, options: &ImportOptions) -> Result<bool, StoreError> {
    Ok(options.kind == ImportKind::Disk && is_qcow2(input, options.format)?)
}

fn is_qcow2(input: &File, format: DiskFormat) -> Result<bool, StoreError> {
    match format {
        DiskFormat::Raw => Ok(false),
        DiskFormat::Qcow2 => Ok(true),
        DiskFormat::Auto => {
            let is_file = input.metadata().map_err(StoreError::transfer("read input"))?.is_file();
            Ok(is_file && qcow2::is_qcow2(input)?)
        }
    }
}

/// The length of what can be read at any offset; `None` for a stream.
pub(super) fn length_of(input: &File) -> io::Result<Option<u64>> {
    let metadata = input.metadata()?;
    if metadata.is_file() {
        Ok(Some(metadata.len()))
    } else if metadata.file_type().is_block_device() {
        Ok(Some(rustix::fs::seek(input, SeekFrom::End(0))?))
    } else {
        Ok(None)
    }
}

/// Copies the data of a file. It is read on a thread of its own, a few
/// pieces ahead.
fn copy_file(
    input: &File,
    len: u64,
    writer: &mut ImageWriter<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), StoreError> {
    std::thread::scope(|scope| {
        let (pieces, received) = sync_channel(PIECES_AHEAD);
        let reader = scope.spawn(move || read_pieces(input, len, &pieces));
        for Piece { start, bytes } in received {
            let done = start + to_u64(bytes.len());
            writer.write_owned(start / to_u64(PAGE_LEN), bytes)?;
            progress(Progress { done, total: Some(len), new_bytes: writer.new_bytes() });
        }
        let read = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        read.map_err(StoreError::transfer("read input"))?;
        progress(Progress { done: len, total: Some(len), new_bytes: writer.new_bytes() });
        Ok(())
    })
}

/// A part of a file that is no hole.
struct Piece {
    start: u64,
    bytes: Vec<u8>,
}

/// Reads until the end, or until nobody wants more.
fn read_pieces(input: &File, len: u64, pieces: &SyncSender<Piece>) -> io::Result<()> {
    let mut at = 0;
    while at < len {
        let data = next_data(input, at, len)?;
        // Pages are written whole, so data begins and ends at pages.
        let mut start = data.start - data.start % to_u64(PAGE_LEN);
        let end = data.end.next_multiple_of(to_u64(PAGE_LEN)).min(len);
        while start < end {
            let count = to_usize((end - start).min(to_u64(BUFFER_LEN)));
            let mut bytes = vec![0; count];
            input.read_exact_at(&mut bytes, start)?;
            if pieces.send(Piece { start, bytes }).is_err() {
                return Ok(());
            }
            start += to_u64(count);
        }
        at = end.max(data.end);
    }
    Ok(())
}

/// The next range with data at or behind `at`; empty at the end if none is.
pub(super) fn next_data(input: &File, at: u64, len: u64) -> io::Result<std::ops::Range<u64>> {
    let start = match rustix::fs::seek(input, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(len..len),
        // Not every file system and device knows about holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(at..len),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(input, SeekFrom::Hole(start))?;
    Ok(start.min(len)..end.clamp(start, len.max(start)))
}

/// Hands over everything from where `input` stands to its end.
fn read_parts(
    mut input: &File,
    total: Option<u64>,
    take: &mut dyn FnMut(&[u8]) -> Result<u64, StoreError>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), StoreError> {
    let mut buffer = vec![0; BUFFER_LEN];
    let mut done = 0;
    loop {
        let count = match input.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(StoreError::transfer("read input")(error)),
        };
        let new_bytes = take(&buffer[..count])?;
        done += to_u64(count);
        progress(Progress { done, total, new_bytes });
    }
}
