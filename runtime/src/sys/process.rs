//! Making processes, and what a process does to itself once.
#![expect(unsafe_code, reason = "fork, unshare and signal handlers")]

use std::ffi::c_int;
use std::io;

use rustix::process::Pid;
use rustix::thread::UnshareFlags;
use vmm_sys_util::signal::register_signal_handler;

/// Where one finds oneself after a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forked {
    /// In the new process.
    Child,
    /// In the old one, which gets the id of the new.
    Parent(Pid),
}

/// Makes a copy of this process, which must have one thread.
pub(crate) fn fork() -> io::Result<Forked> {
    // SAFETY: no other thread exists that could hold a lock which the copy
    // would wait for; callers are the process that machines are forked from,
    // which starts none.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Pid::from_raw(pid)
            .map(Forked::Parent)
            .ok_or_else(|| io::Error::other("fork gave an impossible process id")),
    }
}

/// Processes that this one forks from now on need not be waited for.
pub(crate) fn let_children_go() -> io::Result<()> {
    // SAFETY: ignoring a signal installs no code.
    if unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Moves this process into new namespaces. It must have one thread and share
/// neither files nor folders with others.
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: only `FILES` would invalidate descriptors of other threads; the
    // callers ask for namespaces and have one thread.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Has a system call that the filter forbids end this process, which says
/// which call it was.
pub(crate) fn on_forbidden_call() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, forbidden)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// The field of `siginfo_t` with the number of the call that was refused
/// (`si_syscall`): behind four words of header and the address.
const CALL_OFFSET: usize = 24;
/// How a process ends that made a forbidden call: as a shell shows SIGSYS.
const FORBIDDEN_EXIT: c_int = 128 + libc::SIGSYS;

extern "C" fn forbidden(_: c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a whole siginfo_t, which is 128 bytes long.
    let field = unsafe { info.cast::<u8>().add(CALL_OFFSET) };
    // SAFETY: inside the structure, and aligned to four as the structure is.
    let call = unsafe { field.cast::<c_int>().read() };
    let mut text = *b"machine process: forbidden system call 000\n";
    let mut rest = call;
    for at in (39..42).rev() {
        text[at] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
    }
    // SAFETY: `write` may be called in a handler; the buffer is whole.
    let _lost = unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    // SAFETY: `_exit` may be called in a handler.
    unsafe { libc::_exit(FORBIDDEN_EXIT) }
}
