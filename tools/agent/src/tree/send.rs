//! Walks a tree and hands over its entries, parents first.

use std::fs::{File, Metadata, OpenOptions, ReadDir};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::buffer::spare_capacity;
use rustix::io::retry_on_intr;

use super::TreeError;
use crate::protocol::{CopyReport, Entry, EntryKind, MAX_DATA};

/// One step of a copy.
#[derive(Debug)]
pub(crate) enum Outgoing<'a> {
    /// The next file.
    Entry(Entry),
    /// Bytes of the regular file before it.
    Data(&'a [u8]),
}

/// The name under which a tree lands in an existing directory.
pub(crate) fn top_name(top: &Path) -> Result<Vec<u8>, TreeError> {
    if let Some(name) = top.file_name() {
        return Ok(name.as_bytes().to_vec());
    }
    let whole = top.canonicalize().map_err(|source| failed("find", top, source))?;
    Ok(whole.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default())
}

/// Hands the tree at `top` to `emit`. The top itself is not followed if it is
/// a symbolic link, nor is any other link.
pub(crate) fn send<E: From<TreeError>>(
    top: &Path,
    emit: &mut dyn FnMut(Outgoing<'_>) -> Result<(), E>,
) -> Result<CopyReport, E> {
    let mut walk = Walk { emit, report: CopyReport::default(), buffer: Vec::new() };
    let mut directories: Vec<(PathBuf, ReadDir)> = Vec::new();
    let mut next = Some((top.to_path_buf(), PathBuf::new()));
    loop {
        if let Some((path, below)) = next.take()
            && walk.file(&path, &below)?
        {
            let listing = path.read_dir().map_err(|source| failed("list", &path, source))?;
            directories.push((below, listing));
        }
        let Some((below, listing)) = directories.last_mut() else {
            return Ok(walk.report);
        };
        match listing.next() {
            Some(Ok(entry)) => next = Some((entry.path(), below.join(entry.file_name()))),
            Some(Err(source)) => return Err(failed("list", &top.join(below), source).into()),
            None => {
                directories.pop();
            }
        }
    }
}

struct Walk<'a, E> {
    emit: &'a mut dyn FnMut(Outgoing<'_>) -> Result<(), E>,
    report: CopyReport,
    buffer: Vec<u8>,
}

impl<E: From<TreeError>> Walk<'_, E> {
    /// Hands over one file; whether it is a directory.
    fn file(&mut self, path: &Path, below: &Path) -> Result<bool, E> {
        let meta = path.symlink_metadata().map_err(|source| failed("read", path, source))?;
        let file_type = meta.file_type();
        if file_type.is_file() {
            self.regular(path, below)?;
        } else if file_type.is_symlink() {
            let target = path.read_link().map_err(|source| failed("read", path, source))?;
            let target = target.into_os_string().into_vec();
            self.entry(below, EntryKind::Symlink { target }, &meta)?;
        } else if file_type.is_dir() {
            self.entry(below, EntryKind::Directory { mode: mode(&meta) }, &meta)?;
        } else {
            self.report.skipped += 1;
        }
        Ok(file_type.is_dir())
    }

    fn regular(&mut self, path: &Path, below: &Path) -> Result<(), E> {
        let file = open(path).map_err(|source| failed("open", path, source))?;
        let meta = file.metadata().map_err(|source| failed("read", path, source))?;
        self.entry(below, EntryKind::File { mode: mode(&meta) }, &meta)?;
        loop {
            self.buffer.clear();
            self.buffer.reserve_exact(MAX_DATA);
            let count = retry_on_intr(|| rustix::io::read(&file, spare_capacity(&mut self.buffer)))
                .map_err(|errno| failed("read", path, errno.into()))?;
            if count == 0 {
                return Ok(());
            }
            for piece in self.buffer.chunks(MAX_DATA) {
                (self.emit)(Outgoing::Data(piece))?;
            }
            self.report.bytes += count as u64;
        }
    }

    fn entry(&mut self, below: &Path, kind: EntryKind, meta: &Metadata) -> Result<(), E> {
        let path = below.as_os_str().as_bytes().to_vec();
        let mtime_ns = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
        self.report.entries += 1;
        (self.emit)(Outgoing::Entry(Entry { path, kind, mtime_ns }))
    }
}

/// Opens a file that was a regular one a moment ago; should it have become a
/// pipe or a link since, this neither waits nor follows.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

fn mode(meta: &Metadata) -> u32 {
    meta.mode() & 0o7777
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> TreeError {
    TreeError::Io { what, path: path.to_path_buf(), source }
}
