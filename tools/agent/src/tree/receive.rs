//! Recreates a tree below one directory.
//!
//! Invariant: every file is created by name in a directory that was reached
//! from the caller's directory without following any symbolic link, so a link
//! that came with the tree (or lay there before) leads nowhere.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;

use super::path::{check_relative, check_top, hostile, split, to_path};
use super::{TreeError, top_name};
use crate::protocol::{CopyReport, Entry, EntryKind};

/// Which permission bits a receiver takes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Modes {
    /// All of them.
    All,
    /// Not set-user-id and its kind: the sender is not trusted with them.
    Plain,
}

/// A tree that is being created.
#[derive(Debug)]
pub(crate) struct Receiver {
    /// For messages: where `root` is.
    root_path: PathBuf,
    /// The directory that the tree goes into.
    root: OwnedFd,
    /// The tree's name there.
    top: Vec<u8>,
    modes: Modes,
    /// The regular file that data belongs to.
    file: Option<Open>,
    /// Directories whose final mode and time are set when they are complete,
    /// the innermost last.
    directories: Vec<Pending>,
    /// The directory that was used last.
    parent: Option<(Vec<u8>, OwnedFd)>,
    report: CopyReport,
}

#[derive(Debug)]
struct Open {
    file: File,
    path: Vec<u8>,
    mode: u32,
    mtime_ns: i64,
}

#[derive(Debug)]
struct Pending {
    path: Vec<u8>,
    mode: u32,
    mtime_ns: i64,
}

impl Receiver {
    /// Prepares to create a tree at `target`, or in it under `name` if it is a
    /// directory.
    pub(crate) fn new(target: &Path, name: &[u8], modes: Modes) -> Result<Self, TreeError> {
        let (root_path, top) = if target.is_dir() {
            (target.to_path_buf(), name.to_vec())
        } else if target.as_os_str().as_bytes().ends_with(b"/") {
            return Err(failed("copy into", target, Errno::NOENT));
        } else {
            let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
            (parent.unwrap_or(Path::new(".")).to_path_buf(), top_name(target)?)
        };
        check_top(&top)?;
        let root = rustix::fs::open(
            &root_path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| failed("open the directory", &root_path, errno))?;
        Ok(Self {
            root_path,
            root,
            top,
            modes,
            file: None,
            directories: Vec::new(),
            parent: None,
            report: CopyReport::default(),
        })
    }

    /// Creates the next file.
    pub(crate) fn entry(&mut self, entry: &Entry) -> Result<(), TreeError> {
        let path = self.place(&entry.path)?;
        self.finish_file()?;
        self.leave_directories(&path)?;
        match &entry.kind {
            EntryKind::File { mode } => self.create_file(path, *mode, entry.mtime_ns)?,
            EntryKind::Directory { mode } => self.create_directory(path, *mode, entry.mtime_ns)?,
            EntryKind::Symlink { target } => self.create_symlink(&path, target)?,
        }
        self.report.entries += 1;
        Ok(())
    }

    /// Appends to the file that was created last.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> Result<(), TreeError> {
        let open = self.file.as_mut().ok_or(TreeError::OutOfOrder("data without a file"))?;
        if let Err(source) = open.file.write_all(bytes) {
            let path = open.path.clone();
            self.abandon();
            return Err(self.io("write", &path, source));
        }
        self.report.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Completes the tree.
    pub(crate) fn finish(mut self) -> Result<CopyReport, TreeError> {
        self.finish_file()?;
        while let Some(directory) = self.directories.pop() {
            self.complete(&directory)?;
        }
        if self.report.entries == 0 {
            return Err(TreeError::OutOfOrder("nothing was sent"));
        }
        Ok(self.report)
    }

    /// Where an entry goes, below the root.
    fn place(&self, below: &[u8]) -> Result<Vec<u8>, TreeError> {
        match (self.report.entries, below.is_empty()) {
            (0, true) => Ok(self.top.clone()),
            (0, false) => Err(TreeError::OutOfOrder("the top of the tree must come first")),
            (_, true) => Err(TreeError::OutOfOrder("the top of the tree came twice")),
            (_, false) => {
                check_relative(below)?;
                Ok([&self.top[..], below].join(&b'/'))
            }
        }
    }

    fn create_file(&mut self, path: Vec<u8>, mode: u32, mtime_ns: i64) -> Result<(), TreeError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let created = self.replacing(&path, |parent, name| {
            rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
        });
        let fd = created.map_err(|errno| self.errno("create", &path, errno))?;
        self.file = Some(Open { file: File::from(fd), path, mode, mtime_ns });
        Ok(())
    }

    fn create_symlink(&mut self, path: &[u8], target: &[u8]) -> Result<(), TreeError> {
        if target.is_empty() || target.contains(&0) {
            return Err(hostile(path, "it links to nothing"));
        }
        let target = OsStr::from_bytes(target);
        self.replacing(path, |parent, name| rustix::fs::symlinkat(target, parent, name))
            .map_err(|errno| self.errno("create the link", path, errno))
    }

    fn create_directory(
        &mut self,
        path: Vec<u8>,
        mode: u32,
        mtime_ns: i64,
    ) -> Result<(), TreeError> {
        let (parent, name) = split(&path);
        let made = self
            .parent(parent)
            .and_then(|parent| rustix::fs::mkdirat(parent, OsStr::from_bytes(name), Mode::RWXU));
        match made {
            Ok(()) => {
                self.directories.push(Pending { path, mode, mtime_ns });
                Ok(())
            }
            // An existing directory is filled and keeps its mode; that it is
            // one, and no link, shows when it is opened.
            Err(Errno::EXIST) => match self.parent(&path) {
                Ok(_) => Ok(()),
                Err(errno) => Err(self.errno("copy into", &path, errno)),
            },
            Err(errno) => Err(self.errno("create", &path, errno)),
        }
    }

    /// Creates a file by `make`, in place of one that is no directory.
    fn replacing<T>(
        &mut self,
        path: &[u8],
        make: impl Fn(&OwnedFd, &OsStr) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let (parent, name) = split(path);
        let name = OsStr::from_bytes(name);
        let parent = self.parent(parent)?;
        match make(parent, name) {
            Err(Errno::EXIST) => {
                rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
                make(parent, name)
            }
            other => other,
        }
    }

    /// A directory of the tree, reached without following links.
    fn parent(&mut self, path: &[u8]) -> Result<&OwnedFd, Errno> {
        if path.is_empty() {
            return Ok(&self.root);
        }
        let known = self.parent.as_ref().is_some_and(|(known, _)| known == path);
        if !known {
            let fd = self.open_directory(path, OFlags::PATH)?;
            self.parent = Some((path.to_vec(), fd));
        }
        match &self.parent {
            Some((_, fd)) => Ok(fd),
            None => Err(Errno::NOENT),
        }
    }

    fn open_directory(&self, path: &[u8], access: OFlags) -> Result<OwnedFd, Errno> {
        rustix::fs::openat2(
            &self.root,
            to_path(path),
            access | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )
    }

    fn finish_file(&mut self) -> Result<(), TreeError> {
        let Some(open) = self.file.take() else { return Ok(()) };
        self.stamp(&open.file, open.mode, open.mtime_ns)
            .map_err(|errno| self.errno("set the mode of", &open.path, errno))
    }

    /// Completes the directories that `path` is not in.
    fn leave_directories(&mut self, path: &[u8]) -> Result<(), TreeError> {
        while self.directories.last().is_some_and(|last| !is_below(path, &last.path)) {
            if let Some(directory) = self.directories.pop() {
                self.complete(&directory)?;
            }
        }
        Ok(())
    }

    fn complete(&self, directory: &Pending) -> Result<(), TreeError> {
        self.open_directory(&directory.path, OFlags::RDONLY)
            .and_then(|fd| self.stamp(&fd, directory.mode, directory.mtime_ns))
            .map_err(|errno| self.errno("set the mode of", &directory.path, errno))
    }

    fn stamp(&self, fd: &impl AsFd, mode: u32, mtime_ns: i64) -> Result<(), Errno> {
        let mask = match self.modes {
            Modes::All => 0o7777,
            Modes::Plain => 0o777,
        };
        rustix::fs::fchmod(fd, Mode::from_raw_mode(mode & mask))?;
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec {
                tv_sec: mtime_ns.div_euclid(1_000_000_000),
                tv_nsec: mtime_ns.rem_euclid(1_000_000_000),
            },
        };
        rustix::fs::futimens(fd, &times)
    }

    /// Removes the file that could not be written to its end.
    fn abandon(&mut self) {
        let Some(open) = self.file.take() else { return };
        let (parent, name) = split(&open.path);
        let name = OsStr::from_bytes(name);
        // The write error is what gets reported; a remainder that cannot even
        // be removed adds nothing to it.
        let _removed = self
            .parent(parent)
            .and_then(|parent| rustix::fs::unlinkat(parent, name, AtFlags::empty()));
    }

    fn errno(&self, what: &'static str, path: &[u8], errno: Errno) -> TreeError {
        if errno == Errno::LOOP {
            return hostile(path, "a directory on its way is a symbolic link");
        }
        self.io(what, path, errno.into())
    }

    fn io(&self, what: &'static str, path: &[u8], source: io::Error) -> TreeError {
        TreeError::Io { what, path: self.root_path.join(to_path(path)), source }
    }
}

fn is_below(path: &[u8], directory: &[u8]) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.first() == Some(&b'/'))
}

fn failed(what: &'static str, path: &Path, errno: Errno) -> TreeError {
    TreeError::Io { what, path: path.to_path_buf(), source: errno.into() }
}
