//! The zygote, as the supervisor sees it, and the processes it forks.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::{Mutex, PoisonError};

use super::peer::{Peer, PeerError};
use super::process::{Process, Program};
use crate::protocol::{ZygoteMessage, ZygoteReply, ZygoteRequest};
use crate::sys::channel::Channel;

/// The handle of the process from which machines' processes are forked.
/// Dropping it kills that process; those that it forked go on.
#[derive(Debug)]
pub struct Zygote {
    peer: Peer<ZygoteRequest, ZygoteMessage>,
    child: Mutex<Child>,
}

/// A process that is ready to be a machine's. Dropping it ends it: it sees
/// that its channel is closed.
#[derive(Debug)]
pub struct Unborn {
    pub(super) process: Process,
    pub(super) channel: Channel,
}

impl Zygote {
    /// Starts it.
    pub fn spawn(program: &Program, log: &File) -> Result<Self, PeerError> {
        let name = "the zygote".to_owned();
        let (child, channel) = program.start(&name, log)?;
        let peer = Peer::new(name, channel, |_| {})?;
        Ok(Self { peer, child: Mutex::new(child) })
    }

    /// Forks a process.
    pub fn fork(&self) -> Result<Unborn, PeerError> {
        let (channel, theirs) = Channel::pair()
            .map_err(|source| PeerError::Channel { process: "a machine".to_owned(), source })?;
        let theirs = OwnedFd::from(theirs.into_socket());
        let (reply, received) = self.peer.call(&ZygoteRequest::Spawn, &[theirs.as_fd()])?;
        let ZygoteReply::Spawned { pid } = reply;
        let [descriptor] =
            <[OwnedFd; 1]>::try_from(received).map_err(|_| self.peer.out_of_turn())?;
        Ok(Unborn { process: Process::new(pid, descriptor), channel })
    }
}

impl Unborn {
    /// Whether it can still become a machine.
    pub(super) fn lives(&self) -> bool {
        !self.process.has_ended()
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Fails only if it has been waited for already, which is the goal.
        drop(child.kill());
        drop(child.wait());
    }
}
