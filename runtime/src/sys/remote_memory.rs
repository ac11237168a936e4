//! Another process's memory, through the `/proc/self/mem` that it handed over.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Why memory could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RemoteMemoryError {
    /// The process has ended, and its memory with it.
    #[error("the process whose memory is read at {address:#x} has ended")]
    Gone {
        /// Host virtual address in that process.
        address: u64,
    },
    /// The kernel refused.
    #[error("cannot read {len} bytes at {address:#x} of another process")]
    Read {
        /// Host virtual address in that process.
        address: u64,
        /// Wanted length in bytes.
        len: usize,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// The memory of the process that opened the descriptor.
#[derive(Debug)]
pub struct RemoteMemory(File);

impl RemoteMemory {
    /// Takes over the descriptor.
    pub fn new(descriptor: OwnedFd) -> Self {
        Self(File::from(descriptor))
    }

    /// Fills `bytes` from the address on. A page that is missing there makes
    /// this wait for the page server, as it would any thread of that process.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), RemoteMemoryError> {
        let len = bytes.len();
        match self.0.read_exact_at(bytes, address) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(RemoteMemoryError::Gone { address })
            }
            Err(source) => Err(RemoteMemoryError::Read { address, len, source }),
        }
    }
}

impl AsFd for RemoteMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_reads_back() {
        let descriptor = OwnedFd::from(File::open("/proc/self/mem").unwrap());
        let memory = RemoteMemory::new(descriptor);
        let secret: Vec<u8> = (0..9000u32).map(|n| n.to_le_bytes()[0]).collect();
        let mut read = vec![0; secret.len()];
        memory.read(secret.as_ptr() as u64, &mut read).unwrap();
        assert_eq!(read, secret);
        let error = memory.read(8, &mut read).unwrap_err();
        assert!(matches!(error, RemoteMemoryError::Read { address: 8, .. }), "{error}");
    }
}
