//! The file of a page pool: memory without a name, of a fixed length, in
//! folios of one page.
//!
//! Invariant: a page of the file is allocated if and only if somebody
//! installed it. Large folios break this silently (the rest of the folio
//! reads as zeros that nobody wrote), so a host that makes them for shared
//! memory unasked is refused.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags, SeekFrom, seek};
use rustix::io::Errno;

use crate::protocol::{PAGE_SIZE, PageRun};

const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// Why the host cannot hold page pools.
#[derive(Debug, thiserror::Error)]
pub enum HugePagesError {
    /// The setting makes large folios in shared memory that nobody asked for.
    #[error(
        "{path} is `{value}`, which lets pages appear in a pool that nobody installed; \
         write `never` or `advise` to it"
    )]
    Unasked {
        /// The setting's file.
        path: String,
        /// Its value.
        value: String,
    },
}

/// Refuses a host on which shared memory gets large folios unasked.
///
/// # Errors
/// Which setting does that.
pub fn refuse_huge_pages() -> Result<(), HugePagesError> {
    refuse_huge_pages_of(Path::new(THP))
}

fn refuse_huge_pages_of(thp: &Path) -> Result<(), HugePagesError> {
    refuse_setting(&thp.join("shmem_enabled"))?;
    // A kernel without the folder has no huge pages.
    for size in std::fs::read_dir(thp).into_iter().flatten().flatten() {
        if size.file_name().to_string_lossy().starts_with("hugepages-") {
            refuse_setting(&size.path().join("shmem_enabled"))?;
        }
    }
    Ok(())
}

fn refuse_setting(path: &Path) -> Result<(), HugePagesError> {
    let Ok(text) = std::fs::read_to_string(path) else {
        return Ok(());
    };
    match chosen(&text) {
        Some(value @ ("always" | "within_size" | "force")) => Err(HugePagesError::Unasked {
            path: path.display().to_string(),
            value: value.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// The word in brackets.
fn chosen(text: &str) -> Option<&str> {
    text.split('[').nth(1)?.split(']').next()
}

/// The memory of a pool.
#[derive(Debug)]
pub(crate) struct PoolFile(File);

impl PoolFile {
    /// An empty file that can neither grow nor shrink.
    pub(crate) fn new(len: u64) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL;
        let file = File::from(rustix::fs::memfd_create("coppice-pool", flags)?);
        file.set_len(len)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK)?;
        rustix::fs::fchmod(&file, Mode::RUSR)?;
        Ok(Self(file))
    }

    /// The file of a pool whose page server has ended, which must be as long as
    /// this.
    pub(crate) fn adopt(descriptor: OwnedFd, len: u64) -> io::Result<Self> {
        let file = File::from(descriptor);
        if file.metadata()?.len() != len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self(file))
    }

    /// A second descriptor, for whoever outlives this process.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }

    /// The pages that it holds, as ascending runs, also those that lie in swap.
    /// Only while nobody installs any.
    pub(crate) fn held(&self) -> io::Result<Vec<PageRun>> {
        let mut runs = Vec::new();
        let mut at = 0;
        loop {
            let start = match seek(&self.0, SeekFrom::Data(at)) {
                Ok(start) => start,
                // Nothing behind it.
                Err(Errno::NXIO) => return Ok(runs),
                Err(errno) => return Err(errno.into()),
            };
            at = seek(&self.0, SeekFrom::Hole(start))?;
            let first = start / PAGE_SIZE;
            runs.push(PageRun { first, count: at.div_ceil(PAGE_SIZE) - first });
        }
    }

    /// A descriptor for machines, through which nothing can be written.
    pub(crate) fn read_only(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Pages that the kernel holds for the file.
    pub(crate) fn allocated_pages(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.blocks() / 8)
    }

    /// Lets the kernel take back pages. Whoever maps them faults at the next
    /// touch; what was written to a private mapping stays there.
    pub(crate) fn drop_pages(&self, first: u64, count: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.0, flags, first * 4096, count * 4096)?)
    }

    pub(crate) fn file(&self) -> &File {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_read_only_descriptor_refuses_writes() {
        let pool = PoolFile::new(8192).unwrap();
        let mut file = File::from(pool.read_only().unwrap());
        assert_eq!(file.write(b"x").unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(file.metadata().unwrap().len(), 8192);
        assert_eq!(pool.allocated_pages().unwrap(), 0);
    }

    #[test]
    fn what_it_holds_is_found_by_whoever_comes_next() {
        use std::os::unix::fs::FileExt;
        let pool = PoolFile::new(64 * 4096).unwrap();
        for page in [0, 1, 2, 30, 62, 63] {
            pool.file().write_all_at(&[1; 4096], page * 4096).unwrap();
        }
        let next = PoolFile::adopt(pool.share().unwrap(), 64 * 4096).unwrap();
        drop(pool);
        let run = |first, count| PageRun { first, count };
        assert_eq!(next.held().unwrap(), [run(0, 3), run(30, 1), run(62, 2)]);
        assert!(PoolFile::adopt(next.share().unwrap(), 4096).is_err());
        assert_eq!(PoolFile::new(8192).unwrap().held().unwrap(), []);
    }

    #[test]
    fn the_length_is_fixed() {
        let pool = PoolFile::new(8192).unwrap();
        assert!(pool.file().set_len(4096).is_err());
        assert!(pool.file().set_len(16384).is_err());
    }

    #[test]
    fn a_host_with_unasked_huge_pages_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let setting = dir.path().join("shmem_enabled");
        let size = dir.path().join("hugepages-64kB");
        std::fs::create_dir(&size).unwrap();
        std::fs::write(&setting, "always within_size [advise] never deny force\n").unwrap();
        std::fs::write(size.join("shmem_enabled"), "always [inherit] never\n").unwrap();
        refuse_huge_pages_of(dir.path()).unwrap();

        for value in ["always", "within_size", "force"] {
            std::fs::write(&setting, format!("[{value}] advise never")).unwrap();
            let error = refuse_huge_pages_of(dir.path()).unwrap_err().to_string();
            assert!(error.contains(value) && error.contains("shmem_enabled"), "{error}");
        }
        std::fs::write(&setting, "[never]").unwrap();
        std::fs::write(size.join("shmem_enabled"), "[always] inherit never").unwrap();
        let error = refuse_huge_pages_of(dir.path()).unwrap_err().to_string();
        assert!(error.contains("hugepages-64kB"), "{error}");
    }
}
