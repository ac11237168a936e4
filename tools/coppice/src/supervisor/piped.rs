//! Imports from pipes. A pipe ends in the same way when all was written and when
//! whoever wrote was ended; then the caller was mostly ended with it, by the same
//! key. So a pipe's bytes become a snapshot only while the caller is there, and
//! nobody goes on reading, or waiting for, what no caller wants any more: a pipe
//! may never end.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileTypeExt;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use coppice_engine::{CommitOptions, Name, Role, SnapshotRecord, Store};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::rpc::Imported;

/// Bytes read at once, at most.
const PART_LEN: usize = 1 << 20;
/// How often it is looked whether the caller is still there while nothing comes.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// Whether the input can only be read once, from its beginning to its end.
pub(super) fn is_pipe(input: &File) -> Result<bool> {
    let kind = input.metadata()?.file_type();
    Ok(!kind.is_file() && !kind.is_block_device())
}

/// Whether the other side of a connection was closed.
pub(super) fn has_left(connection: impl std::os::fd::AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let closed = PollFlags::RDHUP | PollFlags::HUP;
    let mut asked = [PollFd::new(&connection, closed)];
    poll(&mut asked, Some(&now)).is_ok_and(|found| found > 0)
}

/// Reads a pipe to its end, and commits what came if the caller waits for it.
pub(super) fn import(
    store: &Store,
    input: &File,
    (name, stream): (Name, bool),
    caller_left: &dyn Fn() -> bool,
    progress: &mut dyn FnMut(coppice_engine::Progress),
) -> Result<Imported> {
    let begun = Instant::now();
    let mut session = store.begin()?;
    let mut pipe = Pipe { input, caller_left, part: vec![0; PART_LEN], done: 0 };
    let mut told = |done: u64, new_bytes: u64| {
        progress(coppice_engine::Progress { done, total: None, new_bytes });
    };
    let (role, image) = if stream {
        let mut writer = session.stream();
        while let Some(part) = pipe.next()? {
            writer.append(part)?;
            told(pipe.done, writer.new_bytes());
        }
        (Role::Stream, writer.finish()?)
    } else {
        let mut writer = session.growing_image();
        while let Some(part) = pipe.next()? {
            writer.append(part)?;
            told(pipe.done, writer.new_bytes());
        }
        (Role::Disk(0), writer.finish()?)
    };
    pipe.refuse_if_left()?;
    let record = SnapshotRecord { images: vec![(role, image)], config: Vec::new(), parent: None };
    let options = CommitOptions { name: Some(name.clone()), ..CommitOptions::default() };
    let done = session.commit(&record, options)?;
    Ok(Imported {
        name: name.to_string(),
        id: done.id.to_string(),
        root: image.root.to_string(),
        logical_bytes: done.logical_bytes,
        new_bytes: done.new_bytes,
        stored_bytes: done.stored_bytes,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// A pipe, and who waits for what comes out of it.
struct Pipe<'p> {
    input: &'p File,
    caller_left: &'p dyn Fn() -> bool,
    part: Vec<u8>,
    done: u64,
}

impl Pipe<'_> {
    /// The next bytes; `None` at the end.
    fn next(&mut self) -> Result<Option<&[u8]>> {
        loop {
            self.refuse_if_left()?;
            let mut asked = [PollFd::new(self.input, PollFlags::IN)];
            match poll(&mut asked, Some(&TICK)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                ready => ready.context("cannot wait for the input")?,
            };
            match self.input.read(&mut self.part) {
                Ok(0) => return Ok(None),
                Ok(count) => {
                    self.done += u64::try_from(count)?;
                    return Ok(Some(&self.part[..count]));
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(error) => return Err(error).context("cannot read input"),
            }
        }
    }

    fn refuse_if_left(&self) -> Result<()> {
        if (self.caller_left)() {
            bail!("the command was ended before its input: nothing is stored");
        }
        Ok(())
    }
}
