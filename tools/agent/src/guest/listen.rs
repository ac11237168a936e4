//! The machine's vsock port and the threads behind it.
//!
//! A few threads wait on the one listening socket. After a restore the
//! transport is reset: connections break, the listening socket stays. So the
//! only thing that ends a thread here is that enough others wait.

#![expect(unsafe_code, reason = "rustix has no vsock addresses")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, listen, socket_with};

use super::agent::{Agent, Ended, Settings};
use super::renew::Targets;
use super::shutdown::{Role, end_machine};
use super::spawn::DEFAULT_PATH;
use crate::protocol::AGENT_PORT;

/// Threads that may wait for a connection at a time.
const MAX_IDLE: usize = 4;

/// Connections that are served at a time; more wait in the backlog.
const MAX_THREADS: usize = 64;

/// The agent's threads need little stack, and every touched page is dear.
const STACK_LEN: usize = 256 << 10;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Why the agent cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The kernel has no vsock.
    #[error("this kernel has no vsock (CONFIG_VIRTIO_VSOCKETS): {0}")]
    NoVsock(#[source] io::Error),
    /// The port cannot be taken.
    #[error("cannot listen on vsock port {AGENT_PORT}: {0}")]
    Port(#[source] io::Error),
    /// No thread can be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

/// Serves as one service among others, until the machine ends.
pub fn run_as_service() -> Result<std::convert::Infallible, ListenError> {
    let agent = Arc::new(Agent::new(settings()));
    Listener::open(agent, Role::Service)?.start(2)?;
    loop {
        thread::park();
    }
}

/// What this machine's agent is given.
pub(super) fn settings() -> Settings {
    use std::os::unix::ffi::OsStringExt;

    let mut environment: Vec<(Vec<u8>, Vec<u8>)> =
        std::env::vars_os().map(|(name, value)| (name.into_vec(), value.into_vec())).collect();
    let home = b"/root".to_vec();
    set(&mut environment, b"HOME", &home, true);
    set(&mut environment, b"PATH", DEFAULT_PATH, false);
    set(&mut environment, b"LANG", b"C.UTF-8", false);
    Settings { targets: Targets::machine(), environment, home }
}

fn set(environment: &mut Vec<(Vec<u8>, Vec<u8>)>, name: &[u8], value: &[u8], replace: bool) {
    match environment.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) if replace => *known = value.to_vec(),
        Some(_) => {}
        None => environment.push((name.to_vec(), value.to_vec())),
    }
}

/// The port, shared by the threads that wait on it.
#[derive(Debug)]
pub(super) struct Listener {
    agent: Arc<Agent>,
    role: Role,
    socket: OwnedFd,
    idle: AtomicUsize,
    threads: AtomicUsize,
}

impl Listener {
    pub(super) fn open(agent: Arc<Agent>, role: Role) -> Result<Arc<Self>, ListenError> {
        let socket =
            socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|errno| ListenError::NoVsock(errno.into()))?;
        bind(&socket).map_err(ListenError::Port)?;
        listen(&socket, BACKLOG).map_err(|errno| ListenError::Port(errno.into()))?;
        let (idle, threads) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Ok(Arc::new(Self { agent, role, socket, idle, threads }))
    }

    /// Puts `count` threads behind the port.
    pub(super) fn start(self: &Arc<Self>, count: usize) -> Result<(), ListenError> {
        for _ in 0..count {
            self.add_thread().map_err(ListenError::Thread)?;
        }
        Ok(())
    }

    fn add_thread(self: &Arc<Self>) -> io::Result<()> {
        let listener = Arc::clone(self);
        self.idle.fetch_add(1, Ordering::SeqCst);
        self.threads.fetch_add(1, Ordering::SeqCst);
        let started = thread::Builder::new().stack_size(STACK_LEN).spawn(move || listener.work());
        if started.is_err() {
            self.idle.fetch_sub(1, Ordering::SeqCst);
            self.threads.fetch_sub(1, Ordering::SeqCst);
        }
        started.map(drop)
    }

    /// One thread: takes connections until enough others wait for them.
    fn work(self: Arc<Self>) {
        loop {
            let connection = self.accept();
            let was_last = self.idle.fetch_sub(1, Ordering::SeqCst) == 1;
            if was_last && self.threads.load(Ordering::SeqCst) < MAX_THREADS {
                // Without another thread the next connection waits for this
                // one to end, which is late but not wrong.
                drop(self.add_thread());
            }
            match self.agent.serve(connection) {
                Ok(Ended::Closed) => {}
                Ok(Ended::Shutdown) => end_machine(&self.agent.children, self.role),
                // The host's end knows best what broke; a reset after a
                // restore is part of normal life.
                Err(_) => {}
            }
            if self.idle.fetch_add(1, Ordering::SeqCst) >= MAX_IDLE {
                self.idle.fetch_sub(1, Ordering::SeqCst);
                self.threads.fetch_sub(1, Ordering::SeqCst);
                return;
            }
        }
    }

    fn accept(&self) -> OwnedFd {
        loop {
            match accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(connection) => return connection,
                Err(Errno::INTR | Errno::CONNABORTED | Errno::CONNRESET) => {}
                // Out of descriptors or memory: something has to end first.
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }
}

fn bind(socket: &OwnedFd) -> io::Result<()> {
    let address = libc::sockaddr_vm {
        svm_family: libc::sa_family_t::try_from(libc::AF_VSOCK).map_err(io::Error::other)?,
        svm_reserved1: 0,
        svm_port: AGENT_PORT,
        svm_cid: libc::VMADDR_CID_ANY,
        svm_zero: [0; 4],
    };
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>());
    let length = length.map_err(io::Error::other)?;
    let pointer = (&raw const address).cast::<libc::sockaddr>();
    // SAFETY: `pointer` refers to a whole vsock address of `length` bytes that
    // lives until the call returns.
    let result = unsafe { libc::bind(socket.as_raw_fd(), pointer, length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
