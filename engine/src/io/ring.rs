#![expect(unsafe_code, reason = "io_uring reads into memory that the caller vouches for")]
//! Reads by `io_uring`, one small ring for each thread that reads.
//!
//! Invariant: while a read is in flight its buffer is owned by this module;
//! it is given back only after its completion was seen, and is leaked if the
//! kernel can no longer be asked. Several may be in flight at once, but none is
//! when a call returns with the ring intact. Where the host forbids `io_uring` (some
//! container runtimes do), reads are plain `pread` calls.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use io_uring::{IoUring, opcode, types};

use crate::units::to_u64;

enum Backend {
    Untried,
    Ring(Box<IoUring>),
    Plain,
}

thread_local! {
    static BACKEND: RefCell<Backend> = const { RefCell::new(Backend::Untried) };
}

/// Reads in flight at once, and so buffers that the kernel may write to.
const DEPTH: u32 = 16;

/// The ring cannot be used any more; reads may still be in flight on it.
struct RingLost;

/// Reads exactly `len` bytes at `offset`; fewer is `UnexpectedEof`.
pub(crate) fn read_exact_at(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let only = read_many(file, &[(offset, len)]).pop();
    only.unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))
}

/// Reads parts of a file, given by offset and length, up to [`DEPTH`] at once;
/// the outcomes are in the order of the parts.
pub(crate) fn read_many(file: &File, parts: &[(u64, usize)]) -> Vec<io::Result<Vec<u8>>> {
    BACKEND.with_borrow_mut(|backend| {
        if let Backend::Untried = backend {
            *backend =
                IoUring::new(DEPTH).map_or(Backend::Plain, |ring| Backend::Ring(Box::new(ring)));
        }
        if let Backend::Ring(ring) = backend {
            match Reads::new(file, parts).run(ring) {
                Ok(outcomes) => return outcomes,
                Err(RingLost) => *backend = Backend::Plain,
            }
        }
        parts.iter().map(|(offset, len)| read_plainly(file, *offset, *len)).collect()
    })
}

fn read_plainly(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// A read that has begun. While it is in flight its buffer is not freed, even
/// if this is dropped, because the kernel may still write to it.
struct Read {
    offset: u64,
    bytes: ManuallyDrop<Vec<u8>>,
    filled: usize,
}

/// Reads of one file on their way through a ring.
struct Reads<'f> {
    file: &'f File,
    parts: &'f [(u64, usize)],
    begun: usize,
    in_flight: u32,
    /// By the number of their part.
    reads: Vec<Option<Read>>,
    outcomes: Vec<io::Result<Vec<u8>>>,
}

impl<'f> Reads<'f> {
    fn new(file: &'f File, parts: &'f [(u64, usize)]) -> Self {
        let outcomes = parts.iter().map(|_| Ok(Vec::new())).collect();
        let reads = parts.iter().map(|_| None).collect();
        Self { file, parts, begun: 0, in_flight: 0, reads, outcomes }
    }

    fn run(mut self, ring: &mut IoUring) -> Result<Vec<io::Result<Vec<u8>>>, RingLost> {
        loop {
            while self.in_flight < DEPTH && self.begun < self.parts.len() {
                let number = self.begun;
                let (offset, len) = self.parts[number];
                self.begun += 1;
                if len > 0 {
                    let bytes = ManuallyDrop::new(vec![0; len]);
                    self.go_on(ring, number, Read { offset, bytes, filled: 0 })?;
                }
            }
            if self.in_flight == 0 {
                return Ok(self.outcomes);
            }
            match ring.submit_and_wait(1) {
                Ok(_) => {}
                // EINTR, EAGAIN and EBUSY leave the reads queued or in flight.
                Err(error) if is_passing(&error) || is_busy(&error) => {}
                Err(_) => return Err(RingLost),
            }
            loop {
                let done = ring.completion().next();
                let Some(done) = done else { break };
                self.settle(ring, done.user_data(), done.result())?;
            }
        }
    }

    /// Puts the rest of a read into the ring.
    fn go_on(&mut self, ring: &mut IoUring, number: usize, mut read: Read) -> Result<(), RingLost> {
        let offset = read.offset + to_u64(read.filled);
        let target = &mut read.bytes[read.filled..];
        let len = u32::try_from(target.len()).unwrap_or(u32::MAX);
        let entry = opcode::Read::new(types::Fd(self.file.as_raw_fd()), target.as_mut_ptr(), len)
            .offset(offset)
            .build()
            .user_data(to_u64(number));
        self.reads[number] = Some(read);
        // SAFETY: the descriptor is borrowed until the ring is empty or lost.
        // The buffer is on the heap, where moving its owner does not move it,
        // and it is not freed before its completion was seen: until then it
        // lies in a `ManuallyDrop`, which leaks it if that is never seen.
        let pushed = unsafe { ring.submission().push(&entry) };
        pushed.map_err(|_| RingLost)?;
        self.in_flight += 1;
        Ok(())
    }

    /// Takes the outcome of a read that is not in flight any more.
    fn settle(&mut self, ring: &mut IoUring, number: u64, result: i32) -> Result<(), RingLost> {
        let number = usize::try_from(number).map_err(|_| RingLost)?;
        let Some(mut read) = self.reads.get_mut(number).and_then(Option::take) else {
            return Err(RingLost);
        };
        self.in_flight -= 1;
        match usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result)) {
            Ok(0) => self.end(number, read, Err(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => {
                read.filled += count;
                if read.filled < read.bytes.len() {
                    return self.go_on(ring, number, read);
                }
                self.end(number, read, Ok(()));
            }
            Err(error) if is_passing(&error) => return self.go_on(ring, number, read),
            Err(error) => self.end(number, read, Err(error)),
        }
        Ok(())
    }

    fn end(&mut self, number: usize, read: Read, outcome: io::Result<()>) {
        let bytes = ManuallyDrop::into_inner(read.bytes);
        self.outcomes[number] = outcome.map(|()| bytes);
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

fn is_busy(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ResourceBusy
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
    fn many_parts_are_read_at_once_and_each_fails_for_itself() {
        let mut file = tempfile::tempfile().expect("a temporary file");
        let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        file.write_all(&bytes).expect("a write");
        let parts: Vec<(u64, usize)> =
            (0..50_usize).map(|at| (to_u64(at * 8_001), (at * 397) % 20_000)).collect();
        for (outcome, (offset, len)) in read_many(&file, &parts).into_iter().zip(&parts) {
            let start = usize::try_from(*offset).expect("a small offset");
            match bytes.get(start..start + len) {
                Some(there) => assert_eq!(outcome.expect("a read"), there),
                None => {
                    let error = outcome.expect_err("beyond the end");
                    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                }
            }
            assert_eq!(
                bytes.get(start..start + len).is_some(),
                read_plainly(&file, *offset, *len).is_ok()
            );
        }
        assert!(read_many(&file, &[]).is_empty());
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
