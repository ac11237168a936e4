//! Running a vCPU on its own thread, and stopping it.
//!
//! The thread holds the vCPU's lock while the guest may run and gives it up
//! when parked, so whoever asked for the pause can read the state. Parked
//! means: the last exit is finished and no instruction runs until `resume`.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use super::exit::{Bus, End, Left, enter, settle};
use crate::sys::kick::{Target, ThreadId};

/// Why a vCPU could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VcpuError {
    /// Its thread could not be started.
    #[error("vCPU thread: {0}")]
    Thread(#[from] io::Error),
}

/// A lost kick is repeated after this long; a vCPU that waits for a page of
/// the guest's page tables ignores them until it has the page.
const KICK_AGAIN: Duration = Duration::from_millis(5);

#[derive(Debug)]
struct Control {
    run: bool,
    parked: bool,
    over: bool,
    thread: Option<ThreadId>,
}

/// Called once when the machine ends on this vCPU.
type OnEnd = Box<dyn FnOnce(End) + Send>;

/// One vCPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: Mutex<VcpuFd>,
    control: Mutex<Control>,
    changed: Condvar,
    /// `CLOCK_MONOTONIC` of the last entry after a park, in nanoseconds.
    entered_ns: AtomicU64,
}

impl Vcpu {
    /// Wraps a vCPU whose state is set; it starts parked.
    pub(crate) fn new(fd: VcpuFd) -> Arc<Self> {
        Arc::new(Self {
            fd: Mutex::new(fd),
            control: Mutex::new(Control { run: false, parked: true, over: false, thread: None }),
            changed: Condvar::new(),
            entered_ns: AtomicU64::new(0),
        })
    }

    /// Starts the thread, parked.
    pub(crate) fn spawn(
        self: &Arc<Self>,
        id: u8,
        bus: Arc<dyn Bus>,
        on_end: OnEnd,
    ) -> Result<(), VcpuError> {
        let vcpu = Arc::clone(self);
        std::thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
            let end = vcpu.work(bus.as_ref());
            vcpu.control().over = true;
            vcpu.changed.notify_all();
            on_end(end);
        })?;
        Ok(())
    }

    fn work(&self, bus: &dyn Bus) -> End {
        self.control().thread = Some(ThreadId::current());
        loop {
            self.wait_until_run();
            let mut fd = lock(&self.fd);
            let target = match Target::new(&mut fd) {
                Ok(target) => target,
                Err(error) => return End::failed(format!("vCPU signal handler: {error}")),
            };
            fd.set_kvm_immediate_exit(0);
            let end = self.run(&mut fd, bus);
            drop(target);
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Runs the guest until a pause is wanted or the machine is over.
    fn run(&self, fd: &mut VcpuFd, bus: &dyn Bus) -> Option<End> {
        self.entered_ns.store(monotonic_ns(), Ordering::Release);
        self.changed.notify_all();
        while self.control().run {
            match enter(fd, bus) {
                Left::Handled => {}
                Left::Kicked => fd.set_kvm_immediate_exit(0),
                Left::Over(end) => return Some(end),
            }
        }
        settle(fd, bus)
    }

    fn wait_until_run(&self) {
        let mut control = self.control();
        control.parked = true;
        self.changed.notify_all();
        while !control.run {
            control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        control.parked = false;
    }

    /// Lets it run.
    pub(crate) fn resume(&self) {
        self.entered_ns.store(0, Ordering::Release);
        self.control().run = true;
        self.changed.notify_all();
    }

    /// When it entered the guest after the last `resume`, once it has.
    pub(crate) fn entered_ns(&self) -> u64 {
        let mut control = self.control();
        loop {
            let entered = self.entered_ns.load(Ordering::Acquire);
            if entered != 0 || control.over {
                return entered;
            }
            let (again, _timeout) = self
                .changed
                .wait_timeout(control, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner);
            control = again;
        }
    }

    /// Asks it to park, without waiting.
    pub(crate) fn request_pause(&self) {
        let mut control = self.control();
        control.run = false;
        if let Some(thread) = control.thread {
            thread.kick();
        }
    }

    /// Waits until it is parked; `false` if that did not happen in time.
    pub(crate) fn wait_parked(&self, deadline: Instant) -> bool {
        let mut control = self.control();
        while !control.parked && !control.over {
            let now = Instant::now();
            if now >= deadline {
                return false;
            }
            if let Some(thread) = control.thread {
                thread.kick();
            }
            let (again, _timeout) = self
                .changed
                .wait_timeout(control, KICK_AGAIN.min(deadline - now))
                .unwrap_or_else(PoisonError::into_inner);
            control = again;
        }
        true
    }

    /// The parked vCPU; blocks while it runs.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        lock(&self.fd)
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        lock(&self.control)
    }
}

/// A panic while a lock was held leaves nothing half done here that a later
/// holder could not use.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `CLOCK_MONOTONIC` in nanoseconds.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
