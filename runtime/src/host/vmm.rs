//! A machine's process, as the supervisor sees it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::claims::Claims;
use super::peer::{News, Peer, PeerError};
use super::process::Process;
use super::zygote::Unborn;
use crate::protocol::{
    MachineConfig, NetConfig, PAGE_SIZE, PageRun, Region, Start, VmmEvent, VmmMessage, VmmReply,
    VmmRequest,
};
use crate::sys::channel::BODY_MAX;
use crate::sys::pagemap::Pagemap;
use crate::sys::remote_memory::RemoteMemory;

/// The handle of a machine's process. Dropping it kills the process.
#[derive(Debug)]
pub struct Vmm {
    peer: Peer<VmmRequest, VmmMessage>,
    process: Process,
    /// What it can rightly say of itself, since its machine was made.
    claims: OnceLock<Claims>,
}

/// A machine that has been made, with what the supervisor needs to reach into
/// it.
#[derive(Debug)]
pub struct Built {
    /// Its mappings.
    pub regions: Vec<Region>,
    /// The userfaultfd of its pooled mappings, for the page server.
    pub userfault: Arc<OwnedFd>,
    /// Its page tables.
    pub pagemap: Pagemap,
    /// Its address space.
    pub memory: RemoteMemory,
}

/// Everything of a paused machine that is neither memory nor disk contents.
#[derive(Debug)]
pub struct SavedMachine {
    /// Serialized machine state.
    pub state: Vec<u8>,
    /// For each disk, the blocks its newest overlay holds.
    pub overlays: Vec<Vec<PageRun>>,
    /// Pages that the guest has ever freed; those that are not the machine's own
    /// now are zero.
    pub freed: Vec<PageRun>,
}

impl Vmm {
    /// Makes a waiting process that of a machine, which writes its log to
    /// `log`. `news` runs on a thread of its own and must not call back into
    /// the handle.
    pub fn raise(
        unborn: Unborn,
        name: &str,
        log: &File,
        news: impl FnMut(News<VmmEvent>) + Send + 'static,
    ) -> Result<Self, PeerError> {
        let Unborn { process, channel } = unborn;
        let peer = Peer::new(format!("machine {name}"), channel, news)?;
        let vmm = Self { peer, process, claims: OnceLock::new() };
        match vmm.peer.call(&VmmRequest::Log, &[log.as_fd()])?.0 {
            VmmReply::Logging => Ok(vmm),
            _ => Err(vmm.peer.out_of_turn()),
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Makes the machine. `descriptors` as [`VmmRequest::Build`] lists them.
    pub fn build(
        &self,
        config: MachineConfig,
        nets: Vec<NetConfig>,
        start: Start,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Built, PeerError> {
        self.peer.expect_bodies(longest_answer(&config));
        let claims = Claims::of(&config);
        let request = VmmRequest::Build { config, nets, start };
        let (reply, received) = self.peer.call(&request, descriptors)?;
        let VmmReply::Built { regions } = reply else { return Err(self.peer.out_of_turn()) };
        claims.check_regions(&regions).map_err(|what| self.distrust(what))?;
        self.claims.set(claims).map_err(|_| self.peer.out_of_turn())?;
        let [userfault, pagemap, memory] =
            <[OwnedFd; 3]>::try_from(received).map_err(|_| self.peer.out_of_turn())?;
        let (pagemap, memory) = (Pagemap::new(pagemap), RemoteMemory::new(memory));
        let userfault = Arc::new(userfault);
        Ok(Built { regions, userfault, pagemap, memory })
    }

    /// Lets the vCPUs run; returns when the first one entered the guest, in
    /// nanoseconds of `CLOCK_MONOTONIC`.
    pub fn resume(&self) -> Result<u64, PeerError> {
        match self.peer.call(&VmmRequest::Resume, &[])?.0 {
            VmmReply::Running { entered_ns } => Ok(entered_ns),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Stops the vCPUs and parks the devices, or gives up after `deadline`.
    pub fn pause(&self, deadline: Duration) -> Result<(), PeerError> {
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        match self.peer.call(&VmmRequest::Pause { deadline_ms }, &[])?.0 {
            VmmReply::Paused => Ok(()),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Describes the paused machine.
    pub fn save(&self) -> Result<SavedMachine, PeerError> {
        self.saved(self.peer.call(&VmmRequest::Save, &[])?.0)
    }

    /// Describes the paused machine and freezes its overlays; the new ones are
    /// taken where the old ones hold blocks.
    pub fn freeze(&self, overlays: &[BorrowedFd<'_>]) -> Result<SavedMachine, PeerError> {
        self.saved(self.peer.call(&VmmRequest::Freeze, overlays)?.0)
    }

    /// What it says that it has may be what its guest made up.
    fn saved(&self, reply: VmmReply) -> Result<SavedMachine, PeerError> {
        let (VmmReply::Saved { state, overlays, freed }, Some(claims)) = (reply, self.claims.get())
        else {
            return Err(self.peer.out_of_turn());
        };
        claims.check_freed(&freed).map_err(|what| self.distrust(what))?;
        claims.check_overlays(&overlays).map_err(|what| self.distrust(what))?;
        Ok(SavedMachine { state, overlays, freed })
    }

    /// A process that says what cannot be is not listened to any more.
    fn distrust(&self, what: &'static str) -> PeerError {
        self.process.end();
        self.peer.implausible(what)
    }

    /// Replaces the oldest frozen overlays of a disk by one that holds the
    /// same.
    pub fn fold(
        &self,
        disk: u32,
        count: u32,
        runs: Vec<PageRun>,
        overlay: BorrowedFd<'_>,
    ) -> Result<(), PeerError> {
        match self.peer.call(&VmmRequest::Fold { disk, count, runs }, &[overlay])?.0 {
            VmmReply::Folded => Ok(()),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Brings in every page of guest memory: another process can read only
    /// pages that are present.
    pub fn populate(&self) -> Result<(), PeerError> {
        match self.peer.call(&VmmRequest::Populate, &[])?.0 {
            VmmReply::Populated => Ok(()),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Opens a stream to a guest port.
    pub fn connect(&self, port: u32) -> Result<UnixStream, PeerError> {
        let (ours, theirs) = UnixStream::pair()
            .map_err(|source| PeerError::Spawn { process: "a stream".to_owned(), source })?;
        match self.peer.call(&VmmRequest::Connect { port }, &[theirs.as_fd()])?.0 {
            VmmReply::Connecting => Ok(ours),
            _ => Err(self.peer.out_of_turn()),
        }
    }

    /// Ends the process and waits for it.
    pub fn stop(&self) {
        // A process that is already gone, or that does not answer sensibly,
        // is ended by the kill below all the same.
        drop(self.peer.call(&VmmRequest::Stop, &[]));
        self.kill();
    }

    /// Kills the process, whatever it is doing, and waits for it.
    pub fn kill(&self) {
        self.process.end();
    }
}

/// What a machine may have to say: its state, and which blocks its overlays
/// hold. Every second block can be a run of its own, and takes at most sixteen
/// bytes then.
fn longest_answer(config: &MachineConfig) -> usize {
    let blocks: u64 = config.disks.iter().map(|disk| disk.len.div_ceil(PAGE_SIZE)).sum();
    BODY_MAX.saturating_add(usize::try_from(blocks.saturating_mul(8)).unwrap_or(usize::MAX))
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;
    use crate::protocol::Content;
    use crate::sys::channel::Channel;

    const MEMORY: u64 = 16 << 20;

    /// A machine whose process answers its last request with `last`.
    fn answered(last: VmmReply) -> (Vmm, Result<SavedMachine, PeerError>) {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let descriptor = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let (channel, theirs) = Channel::pair().unwrap();
        let unborn = Unborn { process: Process::new(child.id(), descriptor), channel };
        std::thread::spawn(move || child.wait().unwrap());
        let taken_over = std::thread::spawn(move || {
            let file = tempfile::tempfile().unwrap();
            let region = Region {
                content: Content::Memory,
                address: 4096,
                len: MEMORY,
                offset: 0,
                pooled: false,
            };
            let built = VmmReply::Built { regions: vec![region] };
            for (reply, descriptors) in [(VmmReply::Logging, 0), (built, 3), (last, 0)] {
                theirs.receive::<VmmRequest>().unwrap();
                let descriptors = vec![file.as_fd(); descriptors];
                theirs.send(&VmmMessage::Reply(Ok(reply)), &descriptors).unwrap();
            }
        });
        let log = tempfile::tempfile().unwrap();
        let vmm = Vmm::raise(unborn, "m", &log, |_| {}).unwrap();
        let config = MachineConfig { memory_bytes: MEMORY, vcpus: 1, disks: Vec::new() };
        let start = Start::Boot { cmdline: String::new() };
        vmm.build(config, Vec::new(), start, &[]).unwrap();
        let saved = vmm.save();
        taken_over.join().unwrap();
        (vmm, saved)
    }

    fn saved(first: u64, count: u64) -> VmmReply {
        let freed = vec![PageRun { first, count }];
        VmmReply::Saved { state: Vec::new(), overlays: Vec::new(), freed }
    }

    #[test]
    fn a_process_that_says_what_cannot_be_is_ended() {
        let (vmm, whole) = answered(saved(0, MEMORY / PAGE_SIZE));
        whole.unwrap();
        assert!(!vmm.process.has_ended());
        // What the bounds of its machine refuse.
        let (vmm, more) = answered(saved(1, MEMORY / PAGE_SIZE));
        let error = more.unwrap_err().to_string();
        assert_eq!(error, "machine m said what cannot be: freed pages that are not its memory's");
        assert!(vmm.process.has_ended());
        // What is no list of pages at all.
        let (_vmm, wild) = answered(saved(u64::MAX, u64::MAX));
        assert!(matches!(wild.unwrap_err(), PeerError::Gone { .. }));
    }
}
