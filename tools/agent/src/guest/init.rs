//! The agent as the machine's first process.

#![expect(unsafe_code, reason = "signal masks and interface flags have no safe wrapper")]

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_remount};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::agent::Agent;
use super::listen::{ListenError, Listener, settings};
use super::shutdown::Role;
use super::spawn::signal_set;

/// Why the machine has no working first process.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A signal call failed.
    #[error("cannot wait for programs to end: {0}")]
    Signals(#[source] io::Error),
    /// The agent cannot be reached.
    #[error(transparent)]
    Listen(#[from] ListenError),
}

/// One file system that every program expects.
struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static std::ffi::CStr,
}

/// In this order: later ones lie in earlier ones.
const MOUNTS: [Mount; 7] = [
    Mount { kind: "proc", target: "/proc", flags: SAFE, data: c"" },
    Mount { kind: "sysfs", target: "/sys", flags: SAFE, data: c"" },
    Mount { kind: "devtmpfs", target: "/dev", flags: MountFlags::NOSUID, data: c"mode=0755" },
    Mount {
        kind: "devpts",
        target: "/dev/pts",
        flags: NO_EXEC,
        data: c"gid=5,mode=620,ptmxmode=666",
    },
    Mount { kind: "tmpfs", target: "/dev/shm", flags: NO_DEV, data: c"mode=1777" },
    Mount { kind: "tmpfs", target: "/run", flags: NO_DEV, data: c"mode=0755" },
    Mount { kind: "tmpfs", target: "/tmp", flags: NO_DEV, data: c"mode=1777" },
];

const NO_DEV: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const NO_EXEC: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
const SAFE: MountFlags = NO_DEV.union(MountFlags::NOEXEC);

/// Sets the machine up and serves until it ends.
pub fn run_as_init() -> Result<Infallible, InitError> {
    // Before any thread exists, so that all of them leave this signal to the
    // loop below.
    let ended = signal_set(&[libc::SIGCHLD]).map_err(|errno| InitError::Signals(errno.into()))?;
    block(&ended)?;
    prepare();
    let agent = Arc::new(Agent::new(settings()));
    Listener::open(Arc::clone(&agent), Role::Init)?.start(2)?;
    eprintln!("coppice-agent: ready");
    loop {
        wait_for(&ended);
        agent.children.reap();
    }
}

/// Makes the machine look as programs expect it. A part that fails is
/// reported on the console; the rest, and the agent, work without it.
fn prepare() {
    make_root_writable();
    for entry in &MOUNTS {
        note(entry.target, mount_one(entry));
    }
    for (name, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let made = symlink(format!("/proc/self/fd{target}"), Path::new("/dev").join(name));
        note(name, made.or_else(existing));
    }
    note("lo", bring_up_loopback());
    if let Ok(name) = fs::read_to_string("/etc/hostname") {
        note(
            "host name",
            rustix::system::sethostname(name.trim().as_bytes()).map_err(io::Error::from),
        );
    }
}

fn note(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        eprintln!("coppice-agent: {what}: {error}");
    }
}

fn existing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

/// Kernels that were told neither `rw` nor `ro` mount the root read-only.
fn make_root_writable() {
    if let Ok(root) = rustix::fs::statvfs("/")
        && root.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY)
    {
        note("/", mount_remount("/", MountFlags::empty(), c"").map_err(io::Error::from));
    }
}

fn mount_one(entry: &Mount) -> io::Result<()> {
    fs::create_dir(entry.target).or_else(existing)?;
    match mount(entry.kind, entry.target, entry.kind, entry.flags, entry.data) {
        // The kernel itself may have mounted /dev.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn bring_up_loopback() -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(c"lo".to_bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING);
    let flags = flags.map_err(io::Error::other)?;
    let request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    // SAFETY: the call reads the request, which names an interface and carries
    // its flags, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn block(signals: &libc::sigset_t) -> Result<(), InitError> {
    // SAFETY: the set is initialized; the old mask is not asked for.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, signals, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(InitError::Signals(io::Error::from_raw_os_error(result))) }
}

/// Waits for one of the signals, or for an interruption, which does no harm.
fn wait_for(signals: &libc::sigset_t) {
    // SAFETY: the set is initialized; no details are asked for.
    unsafe { libc::sigwaitinfo(signals, std::ptr::null_mut()) };
}
