//! The programs that the agent has started, and the reaping of all others.
//!
//! As a machine's first process the agent inherits orphans and must reap
//! whatever ends, while each connection waits for its own program. Invariant:
//! a child is in the table from before anyone can reap it until its owner has
//! its status, so no status is lost and no foreign one is delivered.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus};

use crate::protocol::ExitStatus;

#[derive(Debug, Default)]
pub(super) struct Children {
    table: Mutex<BTreeMap<i32, Option<ExitStatus>>>,
}

/// A program that one connection owns. Killed with its process group, and
/// reaped, when dropped before it ended.
#[derive(Debug)]
pub(super) struct Child<'a> {
    children: &'a Children,
    pid: Pid,
    /// Becomes readable when the program ends.
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
}

impl Children {
    /// Takes ownership of the child that `start` creates.
    pub(super) fn adopt<E: From<Errno>>(
        &self,
        start: impl FnOnce() -> Result<Pid, E>,
    ) -> Result<Child<'_>, E> {
        let mut table = self.table();
        let pid = start()?;
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(errno) => {
                kill_and_reap(pid);
                return Err(errno.into());
            }
        };
        table.insert(pid.as_raw_nonzero().get(), None);
        Ok(Child { children: self, pid, pidfd, status: None })
    }

    /// Reaps every child that has ended; keeps the statuses of those owned.
    pub(super) fn reap(&self) {
        loop {
            let mut table = self.table();
            let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) else {
                return;
            };
            if let Some(slot) = table.get_mut(&pid.as_raw_nonzero().get()) {
                *slot = Some(exit_status(status));
            }
        }
    }

    /// The end of a child whose process has ended.
    fn collect(&self, pid: Pid) -> Result<ExitStatus, Errno> {
        let mut table = self.table();
        let reaped = table.remove(&pid.as_raw_nonzero().get()).flatten();
        match reaped {
            Some(status) => Ok(status),
            None => loop {
                match rustix::process::waitpid(Some(pid), WaitOptions::empty()) {
                    Ok(Some((_, status))) => return Ok(exit_status(status)),
                    Ok(None) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno),
                }
            },
        }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<i32, Option<ExitStatus>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Child<'_> {
    pub(super) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    pub(super) fn status(&self) -> Option<ExitStatus> {
        self.status
    }

    /// Sends a signal to the program's process group, unless it has ended.
    pub(super) fn signal(&self, signal: i32) -> Result<(), Errno> {
        if self.status.is_some() {
            return Ok(());
        }
        let signal = named(signal).ok_or(Errno::INVAL)?;
        rustix::process::kill_process_group(self.pid, signal)
    }

    /// Takes the status of a program that has ended.
    pub(super) fn collect(&mut self) -> Result<ExitStatus, Errno> {
        let status = self.children.collect(self.pid)?;
        self.status = Some(status);
        Ok(status)
    }
}

impl AsFd for Child<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Child<'_> {
    fn drop(&mut self) {
        if self.status.is_none() {
            // It may just have ended by itself, which is as good.
            let _killed = rustix::process::kill_process_group(self.pid, Signal::KILL);
            let _status = self.children.collect(self.pid);
        }
    }
}

fn named(signal: i32) -> Option<Signal> {
    Signal::from_named_raw(signal)
}

fn kill_and_reap(pid: Pid) {
    let _killed = rustix::process::kill_process(pid, Signal::KILL);
    let _status = rustix::process::waitpid(Some(pid), WaitOptions::empty());
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    let small = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitStatus::Code(small(code)),
        (None, Some(signal)) => ExitStatus::Signal(small(signal)),
        // Stops and continues are not asked for.
        (None, None) => ExitStatus::Code(u8::MAX),
    }
}
