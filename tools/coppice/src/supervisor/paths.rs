//! Where a supervisor keeps things.
//!
//! ```text
//! STORE/
//!   packs/ index/ …            the engine's, see docs/format.md
//!   machines/NAME/             one folder for each machine
//!     console.log vmm.log disk0.overlay machine.json
//!   working-sets/ID            what machines of a snapshot touch first
//!   run/supervisor.sock        where the supervisor listens
//!   run/supervisor.log run/pager.log
//! ```

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A unix socket's path has at most this many bytes on Linux.
const SOCKET_PATH_MAX: usize = 107;

/// The places of one store.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    store: PathBuf,
}

impl Paths {
    /// The places of the store in `store`, which need not exist.
    pub(crate) fn new(store: PathBuf) -> Result<Self> {
        let store = std::path::absolute(&store)
            .with_context(|| format!("not a usable path: {}", store.display()))?;
        Ok(Self { store })
    }

    pub(crate) fn store(&self) -> &Path {
        &self.store
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.store.join("run")
    }

    /// The socket; for a store deep in the file system, where its path would
    /// be too long, a name derived from the path in the temporary folder.
    pub(crate) fn socket(&self) -> PathBuf {
        let socket = self.run().join("supervisor.sock");
        if socket.as_os_str().len() <= SOCKET_PATH_MAX {
            return socket;
        }
        let digest = blake3::hash(self.store.as_os_str().as_bytes()).to_hex();
        let user = rustix::process::getuid().as_raw();
        std::env::temp_dir().join(format!("coppice-{user}-{}.sock", &digest[..24]))
    }

    pub(crate) fn supervisor_log(&self) -> PathBuf {
        self.run().join("supervisor.log")
    }

    pub(crate) fn pager_log(&self) -> PathBuf {
        self.run().join("pager.log")
    }

    pub(crate) fn zygote_log(&self) -> PathBuf {
        self.run().join("zygote.log")
    }

    pub(crate) fn machines(&self) -> PathBuf {
        self.store.join("machines")
    }

    pub(crate) fn working_sets(&self) -> PathBuf {
        self.store.join("working-sets")
    }

    pub(crate) fn machine(&self, name: &str) -> PathBuf {
        self.machines().join(name)
    }

    /// Makes the folders, for this user only.
    pub(crate) fn create(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.store)?;
        builder.create(self.run())?;
        builder.create(self.machines())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deep_store_still_has_a_socket_that_fits() {
        let deep = Paths::new(PathBuf::from("/").join("x".repeat(200))).unwrap();
        assert!(deep.socket().as_os_str().len() <= SOCKET_PATH_MAX);
        let other = Paths::new(PathBuf::from("/").join("y".repeat(200))).unwrap();
        assert_ne!(deep.socket(), other.socket());
        let near = Paths::new(PathBuf::from("/store")).unwrap();
        assert_eq!(near.socket(), Path::new("/store/run/supervisor.sock"));
    }
}
