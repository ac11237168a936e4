//! The real disk: reads through `io_uring`, everything else by plain system
//! calls, which `std` already repeats when a signal interrupts them.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

use super::{Access, Disk, DiskFile, Listed, Room, read_exact_at, read_many};

/// A folder of the host's file system.
#[derive(Debug)]
pub(crate) struct RealDisk {
    base: PathBuf,
}

impl RealDisk {
    /// Uses `base`, which must exist.
    pub(crate) fn new(base: &Path) -> Self {
        Self { base: base.to_owned() }
    }

    /// Takes the lock file; `None` if another process has it.
    pub(crate) fn lock(&self, path: &str) -> io::Result<Option<File>> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.base.join(path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

impl Disk for RealDisk {
    fn create(&self, path: &str) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(self.base.join(path))?;
        Ok(Box::new(RealFile(file)))
    }

    fn open(&self, path: &str, access: Access) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::Write)
            .open(self.base.join(path))?;
        Ok(Box::new(RealFile(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.base.join(from), self.base.join(to))
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        std::fs::remove_file(self.base.join(path))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Listed>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(self.base.join(dir))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            match entry.metadata() {
                Ok(metadata) => files.push(Listed { name, len: metadata.len() }),
                // It was removed since, by the owner beside whom we look.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(files)
    }

    fn make_dir(&self, dir: &str) -> io::Result<()> {
        match std::fs::create_dir(self.base.join(dir)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        File::open(self.base.join(dir))?.sync_all()
    }

    fn set_aside(&self, path: &str, len: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).create_new(true).open(self.base.join(path))?;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.remove(path)?;
                Err(error.into())
            }
        }
    }

    fn room(&self) -> io::Result<Option<Room>> {
        let about = rustix::fs::statvfs(&self.base)?;
        let bytes = |blocks: u64| blocks.saturating_mul(about.f_frsize);
        let (capacity, available) = (bytes(about.f_blocks), bytes(about.f_bavail));
        Ok(Some(Room { capacity, available }))
    }

    fn descriptor(&self, path: &str) -> io::Result<File> {
        File::open(self.base.join(path))
    }
}

#[derive(Debug)]
struct RealFile(File);

impl DiskFile for RealFile {
    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        read_exact_at(&self.0, offset, len)
    }

    fn read_many(&self, parts: &[(u64, usize)]) -> Vec<io::Result<Vec<u8>>> {
        read_many(&self.0, parts)
    }

    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
}
