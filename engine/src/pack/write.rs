//! Writing a pack: frames into a temporary file, then seal, flush and rename.
//!
//! Invariant: a [`DurablePack`] exists only after its file was flushed, got
//! its name, and the folder was flushed too.

use super::directory::{Directory, content_hasher, pack_header};
use super::frame::EncodedFrame;
use crate::error::StoreError;
use crate::id::PackId;
use crate::io::{Disk, DiskFile};
use crate::units::{PACKS_DIR, to_u32, to_u64};

/// An unfinished pack in a temporary file.
#[derive(Debug)]
pub(crate) struct PackWriter {
    file: Box<dyn DiskFile>,
    path: String,
    directory: Directory,
    hasher: blake3::Hasher,
}

/// A pack that survives a power cut.
#[derive(Debug, Clone)]
pub(crate) struct DurablePack {
    pub(crate) pack: PackId,
    pub(crate) directory: Directory,
    /// Length of the file in bytes.
    pub(crate) file_len: u64,
}

/// What went wrong when sealing, and whether a flush was it.
#[derive(Debug)]
pub(crate) struct SealError {
    pub(crate) error: StoreError,
    pub(crate) flush_failed: bool,
}

impl PackWriter {
    /// Begins a pack in a new file.
    pub(crate) fn create(disk: &dyn Disk, path: String) -> Result<Self, StoreError> {
        let file = disk.create(&path).map_err(StoreError::io("create", &path))?;
        let mut writer =
            Self { file, path, directory: Directory::empty(), hasher: content_hasher() };
        writer.put(0, &pack_header())?;
        Ok(writer)
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all_at(offset, bytes).map_err(StoreError::io("write", &self.path))?;
        self.hasher.update(bytes);
        Ok(())
    }

    /// Appends a frame.
    pub(crate) fn append(&mut self, frame: &EncodedFrame) -> Result<(), StoreError> {
        self.put(self.directory.content_len, &frame.bytes)?;
        self.directory.push(frame.kind, to_u32(frame.bytes.len()), &frame.keys, &frame.lens);
        Ok(())
    }

    /// What was written so far.
    pub(crate) fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The temporary file.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Makes it a durable pack under the given id.
    pub(crate) fn seal(self, disk: &dyn Disk, pack: PackId) -> Result<DurablePack, SealError> {
        let trailer = self.directory.trailer(pack, self.hasher.finalize().as_bytes());
        let content_len = self.directory.content_len;
        let plain = |error| SealError { error, flush_failed: false };
        let flush = |error| SealError { error, flush_failed: true };
        self.file
            .write_all_at(content_len, &trailer)
            .map_err(StoreError::io("write", &self.path))
            .map_err(plain)?;
        self.file.sync().map_err(StoreError::io("flush", &self.path)).map_err(flush)?;
        let path = pack.path();
        disk.rename(&self.path, &path)
            .map_err(StoreError::io("rename to", &path))
            .map_err(plain)?;
        disk.sync_dir(PACKS_DIR).map_err(StoreError::io("flush", PACKS_DIR)).map_err(flush)?;
        let file_len = content_len + to_u64(trailer.len());
        Ok(DurablePack { pack, directory: self.directory, file_len })
    }
}
