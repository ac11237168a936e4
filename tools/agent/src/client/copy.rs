//! Copies of trees between host and machine.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Client, ClientError, unexpected};
use crate::protocol::{CopyReport, Reply, Request};
use crate::tree::{Modes, Outgoing, Receiver, send, top_name};

impl Client {
    /// Copies the host's `from` into the machine: into `to` if that is a
    /// directory there, else as `to`.
    pub fn put(&mut self, from: &Path, to: &Path) -> Result<CopyReport, ClientError> {
        // A missing source should not leave the agent waiting for a tree.
        let name = top_name(from)?;
        self.send(&Request::Put { path: to.as_os_str().as_bytes().to_vec(), name }, &[])?;
        let sent = send(from, &mut |outgoing| {
            if self.has_answer() {
                return Err(Stopped::ByAgent);
            }
            match outgoing {
                Outgoing::Entry(entry) => self.send(&Request::Entry(entry), &[])?,
                Outgoing::Data(bytes) => self.send(&Request::Data, bytes)?,
            }
            Ok(())
        });
        let skipped = match sent {
            Ok(report) => {
                self.send(&Request::End, &[])?;
                report.skipped
            }
            Err(Stopped::ByAgent) => 0,
            Err(Stopped::Here(error)) => return Err(error),
        };
        match self.receive()? {
            (Reply::Copied(report), _) => Ok(CopyReport { skipped, ..report }),
            (other, _) => Err(unexpected("the end of the copy", other)),
        }
    }

    /// Copies the machine's `from` to the host: into `to` if that is a
    /// directory, else as `to`. Nothing is created elsewhere, whatever the
    /// machine sends, and no file becomes set-user-id.
    pub fn get(&mut self, from: &Path, to: &Path) -> Result<CopyReport, ClientError> {
        self.send(&Request::Get { path: from.as_os_str().as_bytes().to_vec() }, &[])?;
        let mut receiver = match self.receive()? {
            (Reply::Top { name }, _) => Receiver::new(to, &name, Modes::Plain)?,
            (other, _) => return Err(unexpected("the tree's name", other)),
        };
        loop {
            match self.receive()? {
                (Reply::Entry(entry), _) => receiver.entry(&entry)?,
                (Reply::Data, bytes) => receiver.data(bytes)?,
                (Reply::Copied(theirs), _) => {
                    let ours = receiver.finish()?;
                    return Ok(CopyReport { skipped: theirs.skipped, ..ours });
                }
                (other, _) => return Err(unexpected("the next file", other)),
            }
        }
    }

    /// Whether the agent has said something already: during a copy into the
    /// machine that can only be a refusal.
    fn has_answer(&self) -> bool {
        let mut polled = [PollFd::new(&self.stream, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut polled, Some(&now)), Ok(ready) if ready > 0)
    }
}

/// Why a copy into the machine ended before its tree did.
enum Stopped {
    ByAgent,
    Here(ClientError),
}

impl<E: Into<ClientError>> From<E> for Stopped {
    fn from(error: E) -> Self {
        Self::Here(error.into())
    }
}
