//! The orderly end of a machine.

#![expect(unsafe_code, reason = "signals to every process have no safe wrapper")]

use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_remount};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use rustix::system::{RebootCommand, reboot};

use super::children::Children;

/// How long programs have to end by themselves, and then to be killed.
const GRACE: Duration = Duration::from_secs(3);

/// What the agent is in its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The first process: it ends everything else itself.
    Init,
    /// A service: the init system ends the machine.
    Service,
}

/// Ends the machine. Returns only if that failed or is left to others.
pub(super) fn end_machine(children: &Children, role: Role) {
    if role == Role::Service && ask_systemd() {
        return;
    }
    if role == Role::Init {
        for number in [libc::SIGTERM, libc::SIGKILL] {
            if !anything_left() {
                break;
            }
            signal(-1, number);
            wait_for_all(children);
        }
    }
    rustix::fs::sync();
    // A root that cannot be made read-only is synced all the same.
    let _read_only = mount_remount("/", MountFlags::RDONLY, c"");
    // There is no ACPI to switch the power off with: the machine ends when the
    // guest resets it.
    if let Err(errno) = reboot(RebootCommand::Restart) {
        eprintln!("coppice-agent: cannot end the machine: {errno}");
    }
}

/// Whether systemd is there and was told to end the machine.
fn ask_systemd() -> bool {
    // SIGRTMIN+5 starts reboot.target; see systemd(1).
    std::path::Path::new("/run/systemd/system").exists() && signal(1, libc::SIGRTMIN() + 5)
}

/// Sends a signal to process `pid`, or to all but the first if that is -1.
fn signal(pid: libc::pid_t, signal: libc::c_int) -> bool {
    // SAFETY: the call involves no memory of this process.
    unsafe { libc::kill(pid, signal) == 0 }
}

/// Whether any process but the first is left: all others are its descendants.
fn anything_left() -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    !matches!(waitid(WaitId::All, options), Err(Errno::CHILD))
}

fn wait_for_all(children: &Children) {
    let start = Instant::now();
    while start.elapsed() < GRACE {
        children.reap();
        if !anything_left() {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
}
