//! Starting a process that is joined to this one by a channel on its standard
//! input, so that the end of either is seen by the other as end of file.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};

use super::peer::PeerError;
use crate::sys::channel::Channel;

/// The program that becomes a machine's process or the page server.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl Program {
    /// Starts the program with its end of a channel as standard input and
    /// everything it prints in `log`.
    pub fn start(&self, process: &str, log: &File) -> Result<(Child, Channel), PeerError> {
        let spawn = |source| PeerError::Spawn { process: process.to_owned(), source };
        let (ours, theirs) = Channel::pair()
            .map_err(|source| PeerError::Channel { process: process.to_owned(), source })?;
        let child = Command::new(&self.path)
            .args(&self.arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs.into_socket())))
            .stdout(log.try_clone().map_err(spawn)?)
            .stderr(log.try_clone().map_err(spawn)?)
            .spawn()
            .map_err(spawn)?;
        Ok((child, ours))
    }
}

/// A process that another one started, by a descriptor that means this
/// process and no later one with the same number.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    descriptor: OwnedFd,
}

impl Process {
    pub(super) fn new(pid: u32, descriptor: OwnedFd) -> Self {
        Self { pid, descriptor }
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it is there no more.
    pub(super) fn has_ended(&self) -> bool {
        self.wait(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
    }

    /// Kills it, whatever it is doing, and waits until it is gone.
    pub(super) fn end(&self) {
        // Fails only if it has ended already, which is the goal.
        let _ended = pidfd_send_signal(&self.descriptor, Signal::KILL);
        self.wait(None);
    }

    fn wait(&self, limit: Option<&Timespec>) -> bool {
        let mut fds = [PollFd::new(&self.descriptor, PollFlags::IN)];
        loop {
            match poll(&mut fds, limit) {
                Ok(ready) => return ready > 0,
                Err(Errno::INTR) => {}
                Err(_) => return true,
            }
        }
    }
}
