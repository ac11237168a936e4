//! A supervisor for tests: it starts machine processes and fills their pools
//! completely, so that no page server is needed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use coppice_runtime::pieces::Piece;
use coppice_runtime::protocol::{
    AGENT_PORT, Content, DiskConfig, MachineConfig, PAGE_SIZE, PageRun, Region, Start, VmmEvent,
    VmmMessage, VmmReply, VmmRequest,
};
use coppice_runtime::sys::channel::Channel;

const CHILD: &str = "COPPICE_TEST_MACHINE_PROCESS";

/// Not a test by itself: the process that `Process::start` runs.
#[test]
fn machine_process() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let code = coppice_runtime::vmm_main(Channel::new(UnixStream::from(stdin)));
    std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
}

/// A machine's process.
pub(crate) struct Process {
    child: Child,
    channel: Option<Channel>,
    /// Events that came before the reply that was waited for.
    events: Vec<VmmEvent>,
}

impl Process {
    pub(crate) fn start() -> Self {
        let (ours, theirs) = Channel::pair().unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "harness::machine_process", "--nocapture", "--quiet"])
            .env(CHILD, "1")
            .stdin(Stdio::from(OwnedFd::from(theirs.into_socket())))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, channel: Some(ours), events: Vec::new() }
    }

    fn channel(&self) -> &Channel {
        self.channel.as_ref().expect("the channel is open")
    }

    pub(crate) fn ask(
        &mut self,
        request: &VmmRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(VmmReply, Vec<OwnedFd>), String> {
        self.channel().send(request, descriptors).unwrap();
        loop {
            let (message, descriptors) = self.channel().receive::<VmmMessage>().unwrap();
            match message {
                VmmMessage::Reply(reply) => return reply.map(|reply| (reply, descriptors)),
                VmmMessage::Event(event) => self.events.push(event),
            }
        }
    }

    /// Asks without waiting for the answer.
    pub(crate) fn send(&mut self, request: &VmmRequest) {
        self.channel().send(request, &[]).unwrap();
    }

    pub(crate) fn next_event(&mut self) -> VmmEvent {
        if !self.events.is_empty() {
            return self.events.remove(0);
        }
        match self.channel().receive::<VmmMessage>().unwrap().0 {
            VmmMessage::Event(event) => event,
            VmmMessage::Reply(reply) => panic!("a reply nobody asked for: {reply:?}"),
        }
    }

    /// Closes the channel and waits for the process to end.
    pub(crate) fn abandon(&mut self) -> std::process::ExitStatus {
        self.channel = None;
        self.child.wait().unwrap()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.channel = None;
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// A machine with one disk.
pub(crate) struct Machine {
    pub(crate) process: Process,
    pub(crate) config: MachineConfig,
    disk: File,
    overlay: File,
    log: tempfile::NamedTempFile,
    pub(crate) regions: Vec<Region>,
    memory: File,
    pub(crate) uffd: OwnedFd,
}

/// A paused machine, complete.
pub(crate) struct Snapshot {
    pub(crate) config: MachineConfig,
    pub(crate) state: Vec<u8>,
    pub(crate) memory: File,
    pub(crate) disk: File,
    pub(crate) overlays: Vec<Vec<PageRun>>,
}

/// Memory of one pool, and a disk without frozen overlays.
pub(crate) fn restore(snapshot: &Snapshot) -> Start {
    let pages = snapshot.config.memory_bytes / PAGE_SIZE;
    Start::Restore {
        state: snapshot.state.clone(),
        memory: Piece::whole(pages, 0),
        frozen: vec![Vec::new()],
    }
}

pub(crate) fn config(memory_mib: u64, disk: &File) -> MachineConfig {
    let len = disk.metadata().unwrap().len();
    let disks = vec![DiskConfig { len, read_only: false }];
    MachineConfig { memory_bytes: memory_mib << 20, vcpus: 1, disks }
}

impl Machine {
    pub(crate) fn boot(kernel: &File, root: &File, memory_mib: u64, cmdline: &str) -> Self {
        Self::boot_with(kernel, root, memory_mib, 1, cmdline)
    }

    pub(crate) fn boot_with(
        kernel: &File,
        root: &File,
        memory_mib: u64,
        vcpus: u32,
        cmdline: &str,
    ) -> Self {
        let start = Start::Boot { cmdline: cmdline.to_owned() };
        let config = MachineConfig { vcpus, ..config(memory_mib, root) };
        Self::build(config, start, root, kernel)
    }

    pub(crate) fn restore(snapshot: &Snapshot) -> Self {
        let start = restore(snapshot);
        Self::build(snapshot.config.clone(), start, &snapshot.disk, &snapshot.memory)
    }

    /// Over pools that have no page yet; a pager must fill them.
    pub(crate) fn restore_lazily(snapshot: &Snapshot) -> Self {
        let start = restore(snapshot);
        let (disk, memory) = (empty_like(&snapshot.disk), empty_like(&snapshot.memory));
        Self::build(snapshot.config.clone(), start, &disk, &memory)
    }

    fn build(config: MachineConfig, start: Start, disk: &File, image: &File) -> Self {
        let mut process = Process::start();
        let log = tempfile::NamedTempFile::new().unwrap();
        let overlay = tempfile::tempfile().unwrap();
        overlay.set_len(config.disks[0].len).unwrap();
        let append = File::options().append(true).open(log.path()).unwrap();
        let request = VmmRequest::Build { config: config.clone(), nets: Vec::new(), start };
        let pool = read_only(disk);
        let image = read_only(image);
        let descriptors = [append.as_fd(), pool.as_fd(), overlay.as_fd(), image.as_fd()];
        let start = Instant::now();
        let (reply, handed) = process.ask(&request, &descriptors).expect("the machine is built");
        println!("built: {:?}", start.elapsed());
        let VmmReply::Built { regions } = reply else { panic!("{reply:?}") };
        let [uffd, _pagemap, memory] = <[OwnedFd; 3]>::try_from(handed).unwrap();
        let disk = disk.try_clone().unwrap();
        Self { process, config, disk, overlay, log, regions, memory: memory.into(), uffd }
    }

    pub(crate) fn resume(&mut self) -> u64 {
        let start = Instant::now();
        let reply = self.process.ask(&VmmRequest::Resume, &[]).unwrap().0;
        println!("running: {:?}", start.elapsed());
        match reply {
            VmmReply::Running { entered_ns } => entered_ns,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn pause(&mut self) {
        self.pause_within(10_000).unwrap();
    }

    pub(crate) fn pause_within(&mut self, deadline_ms: u64) -> Result<(), String> {
        let request = VmmRequest::Pause { deadline_ms };
        let (reply, _) = self.process.ask(&request, &[])?;
        assert_eq!(reply, VmmReply::Paused);
        Ok(())
    }

    /// Everything of the paused machine.
    pub(crate) fn save(&mut self) -> Snapshot {
        let (reply, _) = self.process.ask(&VmmRequest::Save, &[]).unwrap();
        let VmmReply::Saved { state, overlays, .. } = reply else { panic!("{reply:?}") };
        let config = self.config.clone();
        Snapshot {
            config,
            state,
            memory: self.memory_image(),
            disk: self.disk_image(&overlays[0]),
            overlays,
        }
    }

    fn memory_image(&self) -> File {
        let region = self.regions.iter().find(|region| region.content == Content::Memory).unwrap();
        let mut bytes = vec![0; usize::try_from(region.len).unwrap()];
        self.memory.read_exact_at(&mut bytes, region.address).unwrap();
        memfd(&bytes)
    }

    fn disk_image(&self, runs: &[PageRun]) -> File {
        let mut bytes = Vec::new();
        let mut disk = self.disk.try_clone().unwrap();
        disk.rewind().unwrap();
        disk.read_to_end(&mut bytes).unwrap();
        for run in runs {
            let start = usize::try_from(run.first * PAGE_SIZE).unwrap();
            let end = (start + usize::try_from(run.count * PAGE_SIZE).unwrap()).min(bytes.len());
            self.overlay.read_exact_at(&mut bytes[start..end], start as u64).unwrap();
        }
        memfd(&bytes)
    }

    /// A stream to the guest's agent port.
    pub(crate) fn connect(&mut self) -> UnixStream {
        self.connect_to(AGENT_PORT)
    }

    pub(crate) fn connect_to(&mut self, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reply = self.process.ask(&VmmRequest::Connect { port }, &[theirs.as_fd()]);
        assert_eq!(reply.unwrap().0, VmmReply::Connecting);
        // A machine that hangs fails its test.
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        ours
    }

    /// Sends one command to the test guest and returns its answer.
    pub(crate) fn tell(&mut self, command: &str) -> String {
        let mut stream = self.connect();
        writeln!(stream, "{command}").unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log.path()).unwrap()).into_owned()
    }

    /// Waits until the console shows a text; a guest that never gets there
    /// fails the test with its console.
    pub(crate) fn wait_for_console(&self, text: &str) {
        let limit = Instant::now() + Duration::from_secs(120);
        while !self.log().contains(text) {
            assert!(Instant::now() < limit, "the console never showed {text:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A memory file with every page present.
pub(crate) fn memfd(bytes: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("pool", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(bytes).unwrap();
    file
}

fn empty_like(file: &File) -> File {
    let empty = memfd(&[]);
    empty.set_len(file.metadata().unwrap().len()).unwrap();
    empty
}

fn read_only(file: &File) -> File {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}
