#![expect(unsafe_code, reason = "io_uring reads into memory that the caller vouches for")]
//! Reads by `io_uring`, one small ring for each thread that reads.
//!
//! Invariant: while a read is in flight its buffer is owned by this module;
//! it is given back only after its completion was seen, and is leaked if the
//! kernel can no longer be asked. Where the host forbids `io_uring` (some
//! container runtimes do), reads are plain `pread` calls.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use io_uring::{IoUring, opcode, types};

enum Backend {
    Untried,
    Ring(Box<IoUring>),
    Plain,
}

thread_local! {
    static BACKEND: RefCell<Backend> = const { RefCell::new(Backend::Untried) };
}

/// The ring cannot be used any more; a read may still be in flight on it.
struct RingLost;

/// Reads exactly `len` bytes at `offset`; fewer is `UnexpectedEof`.
pub(crate) fn read_exact_at(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    BACKEND.with_borrow_mut(|backend| {
        if let Backend::Untried = backend {
            *backend = IoUring::new(4).map_or(Backend::Plain, |ring| Backend::Ring(Box::new(ring)));
        }
        if let Backend::Ring(ring) = backend {
            match read_by_ring(ring, file, offset, len) {
                Ok(outcome) => return outcome,
                Err(RingLost) => *backend = Backend::Plain,
            }
        }
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    })
}

fn read_by_ring(
    ring: &mut IoUring,
    file: &File,
    offset: u64,
    len: usize,
) -> Result<io::Result<Vec<u8>>, RingLost> {
    let mut bytes = vec![0; len];
    let mut filled = 0;
    while filled < len {
        let position = offset + crate::units::to_u64(filled);
        let (back, outcome) = read_once(ring, file, position, bytes, filled)?;
        bytes = back;
        match outcome {
            Ok(0) => return Ok(Err(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => filled += count,
            Err(error) if is_passing(&error) => {}
            Err(error) => return Ok(Err(error)),
        }
    }
    Ok(Ok(bytes))
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// One read into `bytes[filled..]`.
fn read_once(
    ring: &mut IoUring,
    file: &File,
    offset: u64,
    bytes: Vec<u8>,
    filled: usize,
) -> Result<(Vec<u8>, io::Result<usize>), RingLost> {
    // Not freed by an early return, because the kernel may still write to it.
    let mut bytes = ManuallyDrop::new(bytes);
    let target = &mut bytes[filled..];
    let len = u32::try_from(target.len()).unwrap_or(u32::MAX);
    let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), target.as_mut_ptr(), len)
        .offset(offset)
        .build();
    // SAFETY: the descriptor is borrowed until this function returns, and the
    // buffer is neither moved nor freed before the completion is seen below;
    // if it is never seen, the buffer is leaked.
    let pushed = unsafe { ring.submission().push(&entry) };
    pushed.map_err(|_| RingLost)?;
    let result = wait(ring)?;
    let outcome = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
    Ok((ManuallyDrop::into_inner(bytes), outcome))
}

/// Waits for the one read in flight.
fn wait(ring: &mut IoUring) -> Result<i32, RingLost> {
    loop {
        if let Some(completion) = ring.completion().next() {
            return Ok(completion.result());
        }
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            // EINTR, EAGAIN and EBUSY leave the read queued or in flight.
            Err(error) if is_passing(&error) || error.kind() == io::ErrorKind::ResourceBusy => {}
            Err(_) => return Err(RingLost),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn reads_what_is_there_and_reports_the_end() {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(&[7; 10_000]).expect("a write");
        assert_eq!(read_exact_at(&file, 9_000, 1_000).expect("a read"), vec![7; 1_000]);
        assert_eq!(read_exact_at(&file, 0, 0).expect("an empty read"), Vec::<u8>::new());
        let error = read_exact_at(&file, 9_001, 1_000).expect_err("beyond the end");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn many_threads_read_at_once() {
        let mut file = tempfile::tempfile().expect("a temporary file");
        let bytes: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        file.write_all(&bytes).expect("a write");
        std::thread::scope(|scope| {
            for worker in 0..4_usize {
                let (file, bytes) = (&file, &bytes);
                scope.spawn(move || {
                    for step in 0..100 {
                        let at = (worker * 7919 + step * 4099) % 700_000;
                        let read = read_exact_at(file, at as u64, 4096).expect("a read");
                        assert_eq!(read, bytes[at..at + 4096]);
                    }
                });
            }
        });
    }
}
