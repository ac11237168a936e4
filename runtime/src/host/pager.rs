//! The page server's process, as the supervisor sees it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::sync::{Mutex, PoisonError};

use super::peer::{News, Peer, PeerError};
use super::process::Program;
use crate::protocol::{
    MachineFaults, MachineKey, PagerEvent, PagerMessage, PagerReply, PagerRequest, PoolId,
    PoolStats, Region,
};

/// Every pool and every attached machine with its counters.
pub type PagerStats = (Vec<(PoolId, PoolStats)>, Vec<(MachineKey, MachineFaults)>);

/// The handle of the page server. Dropping it kills the process.
#[derive(Debug)]
pub struct Pager {
    peer: Peer<PagerRequest, PagerMessage>,
    child: Mutex<Child>,
    pid: u32,
}

impl Pager {
    /// Starts the process. `news` runs on a thread of its own and must not
    /// call back into the handle.
    pub fn spawn(
        program: &Program,
        log: &File,
        news: impl FnMut(News<PagerEvent>) + Send + 'static,
    ) -> Result<Self, PeerError> {
        let process = "the page server".to_owned();
        let (child, channel) = program.start(&process, log)?;
        let pid = child.id();
        let peer = Peer::new(process, channel, news)?;
        Ok(Self { peer, child: Mutex::new(child), pid })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Gives the page server a pack to read from.
    pub fn add_pack(&self, pack: u64, file: BorrowedFd<'_>) -> Result<(), PeerError> {
        self.done(&PagerRequest::AddPack { pack }, &[file])
    }

    /// Makes an empty pool for an image and returns its memfd, read-only.
    pub fn open_pool(&self, pool: PoolId, page_map: BorrowedFd<'_>) -> Result<OwnedFd, PeerError> {
        let (reply, mut received) =
            self.peer.call(&PagerRequest::OpenPool { pool }, &[page_map])?;
        match (reply, received.pop()) {
            (PagerReply::Pool, Some(memory)) => Ok(memory),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Forgets a pool that no machine uses.
    pub fn close_pool(&self, pool: PoolId) -> Result<(), PeerError> {
        self.done(&PagerRequest::ClosePool { pool }, &[])
    }

    /// Serves a machine's faults from now on.
    pub fn attach(
        &self,
        machine: MachineKey,
        regions: Vec<(PoolId, Region)>,
        userfault: &OwnedFd,
    ) -> Result<(), PeerError> {
        self.done(&PagerRequest::Attach { machine, regions }, &[userfault.as_fd()])
    }

    /// Stops serving a machine and returns its last counters.
    pub fn detach(&self, machine: MachineKey) -> Result<MachineFaults, PeerError> {
        match self.peer.call(&PagerRequest::Detach { machine }, &[])?.0 {
            PagerReply::Machine(faults) => Ok(faults),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// All counters.
    pub fn stats(&self) -> Result<PagerStats, PeerError> {
        match self.peer.call(&PagerRequest::Stats, &[])?.0 {
            PagerReply::Stats { pools, machines } => Ok((pools, machines)),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    fn done(
        &self,
        request: &PagerRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), PeerError> {
        match self.peer.call(request, descriptors)?.0 {
            PagerReply::Done => Ok(()),
            _ => Err(self.peer.out_of_turn()),
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Fails only if it has been waited for already, which is the goal.
        drop(child.kill());
        drop(child.wait());
    }
}
