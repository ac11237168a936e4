//! Imports from pipes. A pipe ends in the same way when all was written and when
//! whoever wrote was ended; then the caller was mostly ended with it, by the same
//! key. So a pipe's bytes become a snapshot only while the caller is there.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::time::Instant;

use anyhow::{Result, bail};
use coppice_engine::{CommitOptions, Name, Role, SnapshotRecord, Store};
use rustix::event::{PollFd, PollFlags, poll};

use crate::rpc::Imported;

/// Whether the input can only be read once, from its beginning to its end.
pub(super) fn is_pipe(input: &File) -> Result<bool> {
    let kind = input.metadata()?.file_type();
    Ok(!kind.is_file() && !kind.is_block_device())
}

/// Whether the other side of a connection was closed.
pub(super) fn has_left(connection: impl std::os::fd::AsFd) -> bool {
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
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
    let (role, image) = if stream {
        (Role::Stream, session.import_stream(input, progress)?)
    } else {
        (Role::Disk(0), session.import_image(input, progress)?)
    };
    if caller_left() {
        bail!("the command was ended before its input: nothing is stored as {name}");
    }
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
