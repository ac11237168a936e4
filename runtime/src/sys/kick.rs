//! Getting a thread out of `KVM_RUN`.
//!
//! A real-time signal ends a running `KVM_RUN` with `EINTR`. One that arrives
//! just before the call would be lost, so its handler also sets the vCPU's
//! `immediate_exit`, which the next `KVM_RUN` sees.
#![expect(unsafe_code, reason = "signal handling and the shared kvm_run page")]

use std::cell::Cell;
use std::io;
use std::ptr::null_mut;
use std::sync::OnceLock;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    static CURRENT: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = CURRENT.get();
    if !run.is_null() {
        // SAFETY: `Target` cleared the cell if the page is no longer mapped,
        // and the handler runs on the only thread that uses this vCPU.
        let flag = unsafe { &raw mut (*run).immediate_exit };
        // SAFETY: as above; a byte of the page has no alignment to break.
        unsafe { flag.write_volatile(1) };
    }
}

/// While it lives, kicks of this thread also reach a vCPU that is about to
/// enter the guest.
#[derive(Debug)]
pub struct Target {
    _not_send: std::marker::PhantomData<*mut kvm_run>,
}

impl Target {
    /// Makes `vcpu` the one that this thread runs.
    pub fn new(vcpu: &mut VcpuFd) -> io::Result<Self> {
        install()?;
        CURRENT.set(vcpu.get_kvm_run());
        Ok(Self { _not_send: std::marker::PhantomData })
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        CURRENT.set(null_mut());
    }
}

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), on_kick).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// A thread that can be kicked.
#[derive(Debug, Clone, Copy)]
pub struct ThreadId(i32);

impl ThreadId {
    /// The calling thread.
    pub fn current() -> Self {
        Self(rustix::thread::gettid().as_raw_nonzero().get())
    }

    /// Interrupts its `KVM_RUN`, or the next one. A thread that has ended is
    /// left alone by the kernel.
    pub fn kick(self) {
        let process = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: the call takes plain numbers; the signal has a handler
        // since before this id was handed out.
        let _gone = unsafe { libc::syscall(libc::SYS_tgkill, process, self.0, SIGRTMIN()) };
    }
}
