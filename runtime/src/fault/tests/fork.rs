//! A stand-in for a machine's process: a private mapping of a pool with a
//! userfaultfd of its own, attached to a page server that runs on a thread.
#![expect(unsafe_code, reason = "a test maps pools as a machine does")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::super::{Library, Page, Script, ScriptedLibrary, Settings, serve_pages};
use crate::host::PagerStats;
use crate::pieces::Piece;
use crate::protocol::{
    Content, MachineKey, PageRun, PagerEvent, PagerMessage, PagerReply, PagerRequest, PoolId,
    PoolStats, Region,
};
use crate::sys::channel::Channel;
use crate::sys::pagemap::Pagemap;
use crate::sys::userfault::Userfault;

/// False, loudly, where userfaultfd is not to be had.
pub(super) fn can_fault() -> bool {
    match Userfault::new() {
        Ok(_) => true,
        Err(error) => {
            let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
            assert!(!ci, "userfaultfd is required under CI: {error}");
            eprintln!("skipped: no userfaultfd: {error}");
            false
        }
    }
}

/// A page server on a thread, and the supervisor's end of its channel.
pub(super) struct Host {
    channel: Option<Channel>,
    replies: mpsc::Receiver<(Result<PagerReply, String>, Vec<OwnedFd>)>,
    pub(super) events: mpsc::Receiver<PagerEvent>,
    server: Option<JoinHandle<()>>,
}

impl Host {
    pub(super) fn new(script: Script) -> Self {
        Self::with(Arc::new(ScriptedLibrary(script)))
    }

    pub(super) fn with(library: Arc<dyn Library>) -> Self {
        Self::with_settings(library, Settings::default())
    }

    pub(super) fn with_settings(library: Arc<dyn Library>, settings: Settings) -> Self {
        let (near, far) = Channel::pair().unwrap();
        let server = std::thread::spawn(move || {
            serve_pages(&far, library, &settings).unwrap();
        });
        let (reply_to, replies) = mpsc::channel();
        let (event_to, events) = mpsc::channel();
        let reader = near.try_clone().unwrap();
        std::thread::spawn(move || {
            while let Ok((message, descriptors)) = reader.receive::<PagerMessage>() {
                let sent = match message {
                    PagerMessage::Reply(reply) => reply_to.send((reply, descriptors)).is_ok(),
                    PagerMessage::Event(event) => event_to.send(event).is_ok(),
                };
                if !sent {
                    return;
                }
            }
        });
        Self { channel: Some(near), replies, events, server: Some(server) }
    }

    pub(super) fn call(
        &self,
        request: &PagerRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> (Result<PagerReply, String>, Vec<OwnedFd>) {
        self.channel.as_ref().unwrap().send(request, descriptors).unwrap();
        self.replies.recv().unwrap()
    }

    pub(super) fn open_pool(&self, id: u64) -> OwnedFd {
        self.open_pool_of(id, &[])
    }

    pub(super) fn open_pool_of(&self, id: u64, map: &[u8]) -> OwnedFd {
        use std::io::Write;
        let memfd = rustix::fs::memfd_create("map", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(memfd);
        file.write_all(map).unwrap();
        let (reply, mut descriptors) =
            self.call(&PagerRequest::OpenPool { pool: PoolId(id) }, &[file.as_fd()]);
        assert_eq!(reply, Ok(PagerReply::Pool));
        descriptors.remove(0)
    }

    /// Maps the pool in a new fork and attaches it.
    pub(super) fn fork(&self, machine: u64, pool: u64, memory: &OwnedFd) -> Fork {
        let fork = Fork::new(memory);
        let request = PagerRequest::Attach {
            machine: MachineKey(machine),
            regions: vec![(PoolId(pool), fork.region())],
        };
        let (reply, _) = self.call(&request, &[fork.userfault.as_fd()]);
        assert_eq!(reply, Ok(PagerReply::Done));
        fork
    }

    /// Maps pieces of pools in a new fork and attaches it.
    pub(super) fn fork_of_pieces(&self, machine: u64, pieces: &[Piece<Mappable>]) -> Fork {
        let fork = Fork::of_pieces(pieces);
        let regions = pieces.iter().map(|piece| {
            let offset = piece.run.first * 4096;
            let address = fork.address as u64 + offset;
            let region = Region { address, offset, len: piece.run.count * 4096, ..fork.region() };
            (PoolId(piece.pool.id), region)
        });
        let request =
            PagerRequest::Attach { machine: MachineKey(machine), regions: regions.collect() };
        let (reply, _) = self.call(&request, &[fork.userfault.as_fd()]);
        assert_eq!(reply, Ok(PagerReply::Done));
        fork
    }

    /// An empty layer for a fork.
    pub(super) fn open_layer(&self, layer: u64, machine: u64, fork: &Fork) -> OwnedFd {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let memory = File::open("/proc/self/mem").unwrap();
        let Region { address, len, .. } = fork.region();
        let (layer, machine) = (PoolId(layer), MachineKey(machine));
        let request = PagerRequest::OpenLayer { layer, machine, address, len };
        let (reply, mut files) = self.call(&request, &[pagemap.as_fd(), memory.as_fd()]);
        assert_eq!(reply, Ok(PagerReply::Layer));
        files.remove(0)
    }

    /// Freezes a layer; how many pages it has.
    pub(super) fn freeze(&self, layer: u64) -> u64 {
        let request = PagerRequest::Freeze { layer: PoolId(layer), pages_max: u64::MAX };
        match self.call(&request, &[]).0 {
            Ok(PagerReply::Frozen { pages }) => pages,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn runs(&self, layer: u64) -> Vec<PageRun> {
        match self.call(&PagerRequest::LayerRuns { layer: PoolId(layer) }, &[]).0 {
            Ok(PagerReply::Runs(runs)) => runs,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn stats(&self) -> PagerStats {
        match self.call(&PagerRequest::Stats, &[]).0 {
            Ok(PagerReply::Stats { pools, machines }) => (pools, machines),
            other => panic!("{other:?}"),
        }
    }

    /// The counters of the only pool, when they are as expected: the last
    /// fetch may still be at its neighbours when all that was asked for is
    /// there. Counters that never come to that are a failure.
    pub(super) fn pool_with(&self, expected: impl Fn(&PoolStats) -> bool) -> PoolStats {
        let begun = std::time::Instant::now();
        loop {
            let stats = self.stats().0[0].1;
            if expected(&stats) {
                return stats;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{stats:?}");
            std::thread::yield_now();
        }
    }

    /// The next event; its absence is a failure, never a hang.
    pub(super) fn event(&self) -> PagerEvent {
        self.events.recv_timeout(Duration::from_secs(60)).expect("an event comes")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let channel = self.channel.take().unwrap();
        channel.socket().shutdown(std::net::Shutdown::Both).unwrap();
        let server = self.server.take().unwrap();
        if !std::thread::panicking() {
            server.join().unwrap();
        }
    }
}

/// A pool or a layer, and its memory.
#[derive(Debug, Clone)]
pub(super) struct Mappable {
    pub(super) id: u64,
    pub(super) memory: Arc<OwnedFd>,
}

/// A private mapping of a pool whose faults go to a page server.
pub(super) struct Fork {
    address: usize,
    len: usize,
    pub(super) userfault: Userfault,
    pagemap: Pagemap,
}

impl Fork {
    fn new(memory: &OwnedFd) -> Self {
        let len = File::from(memory.try_clone().unwrap()).metadata().unwrap().len();
        let memory = Arc::new(memory.try_clone().unwrap());
        Self::of_pieces(&Piece::whole(len / 4096, Mappable { id: 0, memory }))
    }

    pub(super) fn of_pieces(pieces: &[Piece<Mappable>]) -> Self {
        let pages: u64 = pieces.iter().map(|piece| piece.run.count).sum();
        let len = usize::try_from(pages * 4096).unwrap();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let anywhere = flags | libc::MAP_ANONYMOUS;
        // SAFETY: without MAP_FIXED no existing mapping is affected.
        let start = unsafe { libc::mmap(null_mut(), len, prot, anywhere, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        let address = start.expose_provenance();
        for Piece { run, pool } in pieces {
            let at = address + usize::try_from(run.first * 4096).unwrap();
            let at = std::ptr::with_exposed_provenance_mut(at);
            let (fd, offset) = (pool.memory.as_raw_fd(), i64::try_from(run.first * 4096).unwrap());
            let len = usize::try_from(run.count * 4096).unwrap();
            let fixed = flags | libc::MAP_FIXED;
            // SAFETY: the range is part of the mapping that was just made.
            let placed = unsafe { libc::mmap(at, len, prot, fixed, fd, offset) };
            assert_eq!(placed, at);
        }
        let userfault = Userfault::new().unwrap();
        userfault.register(address as u64, len).unwrap();
        let pagemap = Pagemap::new(File::open("/proc/self/pagemap").unwrap().into());
        Self { address, len, userfault, pagemap }
    }

    pub(super) fn region(&self) -> Region {
        Region {
            content: Content::Memory,
            address: self.address as u64,
            len: self.len as u64,
            offset: 0,
            pooled: true,
        }
    }

    pub(super) fn pages(&self) -> u64 {
        self.len as u64 / 4096
    }

    fn pointer(&self, page: u64) -> *mut Page {
        assert!(page < self.pages());
        let offset = usize::try_from(page).unwrap() * 4096;
        std::ptr::with_exposed_provenance_mut(self.address + offset)
    }

    pub(super) fn read(&self, page: u64) -> Page {
        // SAFETY: the page lies in the mapping; whoever writes to it does so
        // on the same thread.
        unsafe { self.pointer(page).read_volatile() }
    }

    pub(super) fn write(&self, page: u64, bytes: &Page) {
        // SAFETY: as for reading.
        unsafe { self.pointer(page).write_volatile(*bytes) }
    }

    /// Reads through the kernel, where poison is an error and no signal.
    pub(super) fn read_by_system_call(&self, page: u64) -> std::io::Result<()> {
        let (_reader, writer) = std::io::pipe()?;
        // SAFETY: the kernel reads the page and changes nothing; it checks
        // the address itself.
        let sent = unsafe { libc::write(writer.as_raw_fd(), self.pointer(page).cast(), 4096) };
        if sent == 4096 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    /// Pages mapped from the pool and pages of its own, by the kernel's word.
    pub(super) fn counts(&self) -> (u64, u64) {
        let counts = self.pagemap.count(self.range()).unwrap();
        (counts.shared, counts.private)
    }

    /// The dirty pages, one by one.
    pub(super) fn dirty(&self) -> Vec<u64> {
        let runs = self.pagemap.dirty(self.range()).unwrap();
        runs.iter().flat_map(|run| run.first..run.first + run.count).collect()
    }

    fn range(&self) -> std::ops::Range<u64> {
        self.address as u64..(self.address + self.len) as u64
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: the range is this mapping, and no thread uses it any more.
        let _refusal = unsafe { libc::munmap(start, self.len) };
    }
}

/// A permutation of the pages, different for each seed.
pub(super) fn shuffled(pages: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..pages).collect();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for last in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let other = usize::try_from(state % (last as u64 + 1)).unwrap();
        order.swap(last, other);
    }
    order
}
