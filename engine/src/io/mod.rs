//! The disk as the engine sees it: a few operations on files with relative
//! names, small enough to be simulated.
//!
//! A file written with [`DiskFile::write_all_at`] survives a power cut only
//! after [`DiskFile::sync`]; its name survives only after
//! [`Disk::sync_dir`] on its folder. Nothing else is assumed.

mod real;
mod ring;
mod sim;

use std::fmt::Debug;
use std::fs::File;
use std::io;

use crate::units::{to_u64, to_usize};

pub(crate) use real::RealDisk;
pub(crate) use ring::{read_exact_at, read_many};
pub use sim::{Counts, Faults, SimDisk};

/// What an open file may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading and writing.
    Write,
}

/// The room on a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// All of it.
    pub capacity: u64,
    /// What is free.
    pub available: u64,
}

/// A file in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name inside the folder.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
}

/// A place for files. Paths are relative, with `/` between folders.
pub trait Disk: Send + Sync + Debug {
    /// Makes a new file for writing; it must not exist.
    fn create(&self, path: &str) -> io::Result<Box<dyn DiskFile>>;

    /// Opens an existing file.
    fn open(&self, path: &str, access: Access) -> io::Result<Box<dyn DiskFile>>;

    /// Gives a file another name, replacing what has it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &str) -> io::Result<()>;

    /// The files in a folder, in no particular order.
    fn list(&self, dir: &str) -> io::Result<Vec<Listed>>;

    /// Makes a folder if it does not exist.
    fn make_dir(&self, dir: &str) -> io::Result<()>;

    /// Makes the names in a folder durable; the store's own is "".
    fn sync_dir(&self, dir: &str) -> io::Result<()>;

    /// Makes a new file of this length whose room on the disk is taken; its
    /// bytes mean nothing. If that fails there is no such file.
    fn set_aside(&self, path: &str, len: u64) -> io::Result<()> {
        let file = self.create(path)?;
        let block = vec![0; 1 << 16];
        let mut done = 0;
        while done < len {
            let part = &block[..to_usize(to_u64(block.len()).min(len - done))];
            if let Err(error) = file.write_all_at(done, part) {
                self.remove(path)?;
                return Err(error);
            }
            done += to_u64(part.len());
        }
        Ok(())
    }

    /// How much room there is, if that is known.
    fn room(&self) -> io::Result<Option<Room>> {
        Ok(None)
    }

    /// A read-only descriptor of a file, for another process.
    fn descriptor(&self, path: &str) -> io::Result<File>;
}

/// An open file.
pub trait DiskFile: Send + Sync + Debug {
    /// Reads exactly `len` bytes; fewer is `UnexpectedEof`.
    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>>;

    /// Reads parts, given by offset and length, as many at once as the disk
    /// likes; in the order of the parts.
    fn read_many(&self, parts: &[(u64, usize)]) -> Vec<io::Result<Vec<u8>>> {
        parts.iter().map(|(offset, len)| self.read_at(*offset, *len)).collect()
    }

    /// Writes all of `bytes`.
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes content and length durable.
    fn sync(&self) -> io::Result<()>;

    /// Length in bytes.
    fn length(&self) -> io::Result<u64>;

    /// Cuts the file to `len` bytes.
    fn truncate(&self, len: u64) -> io::Result<()>;
}
