//! What a machine was booted with, so that its disks can be booted anew.
//!
//! The kernel is part of every snapshot of a machine, as a byte stream, so it is
//! stored once. Until a machine that was booted from a file is captured, a copy
//! of the file is kept that nobody else can change: what is stored later is what
//! was booted.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use coppice_engine::{ImageRef, Role, Session};

use super::Supervisor;
use super::capture::Gathered;
use super::machine::Lineage;

/// Longest kernel file.
const KERNEL_MAX: u64 = 512 << 20;
/// Bytes copied at once.
const PART: usize = 1 << 20;

/// Kernel and command line of a machine.
#[derive(Debug, Clone)]
pub(crate) struct Boots {
    /// As the caller wrote it: the machine adds its devices.
    pub(crate) cmdline: String,
    /// The kernel, unless the machine's lineage has it in the store.
    pub(crate) kernel: Option<Arc<File>>,
}

impl Supervisor {
    /// A copy of a kernel file that goes when nobody has it open, read-only.
    pub(crate) fn keep_kernel(&self, mut kernel: &File) -> Result<Arc<File>> {
        if kernel.metadata()?.is_file() {
            kernel.rewind().context("cannot read the kernel")?;
        }
        let (mut copy, kept) = self.unnamed_file("kernel")?;
        let len = std::io::copy(&mut kernel.take(KERNEL_MAX + 1), &mut copy)
            .context("cannot copy the kernel")?;
        if len > KERNEL_MAX {
            bail!("the kernel file is longer than {} MiB, which cannot be right", KERNEL_MAX >> 20);
        }
        Ok(Arc::new(kept))
    }

    /// A kernel of the store as a file.
    pub(crate) fn stored_kernel(&self, kernel: &ImageRef) -> Result<Arc<File>> {
        let (mut copy, kept) = self.unnamed_file("kernel")?;
        self.store
            .export_to(kernel, &mut copy, &mut |_| {})
            .context("cannot read the snapshot's kernel")?;
        copy.flush()?;
        Ok(Arc::new(kept))
    }

    /// An empty file without a name, to write and only to read.
    fn unnamed_file(&self, what: &str) -> Result<(File, File)> {
        let path = self.paths.run().join(format!("{what}-{}", self.next_key()));
        let (writer, reader) = make(&path)
            .with_context(|| format!("cannot make a file in {}", self.paths.run().display()))?;
        Ok((writer, reader))
    }
}

fn make(path: &Path) -> std::io::Result<(File, File)> {
    let writer = File::options().write(true).create(true).truncate(true).open(path)?;
    let reader = File::open(path);
    std::fs::remove_file(path)?;
    Ok((writer, reader?))
}

/// Adds the kernel to what a session commits: the image that the lineage has, or
/// the file, which is read now.
pub(super) fn gather_kernel(
    session: &mut Session,
    file: Option<&File>,
    below: &Lineage,
    gathered: &mut Gathered,
) -> Result<()> {
    let kernel = match (below.kernel, file) {
        (None, Some(file)) => Some(read_kernel(session, file)?),
        (kernel, _) => kernel,
    };
    gathered.images.extend(kernel.map(|kernel| (Role::Stream, kernel)));
    Ok(())
}

fn read_kernel(session: &mut Session, file: &File) -> Result<ImageRef> {
    let mut writer = session.stream();
    let mut part = vec![0; PART];
    let mut at = 0;
    loop {
        let count = file.read_at(&mut part, at).context("cannot read the kernel")?;
        if count == 0 {
            return Ok(writer.finish()?);
        }
        writer.append(&part[..count])?;
        at += u64::try_from(count)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_file_has_no_name_and_cannot_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, reader) = make(&folder.path().join("kernel-1")).unwrap();
        writer.write_all(b"kernel").unwrap();
        let mut bytes = [0; 6];
        reader.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"kernel");
        reader.write_at(b"x", 0).unwrap_err();
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    }
}
