//! A guest that runs by itself, on a thread of its own, until it is stopped.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coppice_runtime::sys::kick::{Target, ThreadId};
use kvm_ioctls::VcpuExit;

use crate::guest::PORT;
use crate::machine::Machine;

/// A kick that was lost is repeated after this long.
const KICK_AGAIN: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
struct Control {
    run: bool,
    /// What the guest counts down, while it stands still.
    stopped: Option<u64>,
    thread: Option<ThreadId>,
    failed: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
}

/// The handle of the thread.
#[derive(Debug)]
pub struct Runner(Arc<Shared>);

impl Runner {
    /// Lets the machine run.
    pub fn start(machine: Machine) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.lock().run = true;
        let own = Arc::clone(&shared);
        std::thread::Builder::new().name("vcpu".to_owned()).spawn(move || {
            if let Err(error) = run(machine, &own) {
                own.lock().failed = Some(format!("{error:#}"));
                own.changed.notify_all();
            }
        })?;
        Ok(Self(shared))
    }

    /// Stops it, and returns what it counts down.
    pub fn stop(&self) -> Result<u64> {
        let mut control = self.0.lock();
        control.run = false;
        loop {
            if let Some(failed) = &control.failed {
                bail!("{failed}");
            }
            if let Some(counter) = control.stopped {
                return Ok(counter);
            }
            if let Some(thread) = control.thread {
                thread.kick();
            }
            let (again, _timeout) = self
                .0
                .changed
                .wait_timeout(control, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner);
            control = again;
        }
    }

    /// Lets it go on.
    pub fn go_on(&self) {
        let mut control = self.0.lock();
        control.run = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn run(mut machine: Machine, shared: &Shared) -> Result<()> {
    let _target = Target::new(machine.vcpu()).context("the signal handler")?;
    shared.lock().thread = Some(ThreadId::current());
    loop {
        while shared.lock().run {
            match machine.vcpu().run() {
                Ok(VcpuExit::IoOut(PORT, _)) => {}
                Ok(exit) => bail!("the guest stopped at {exit:?}"),
                Err(error) if error.errno() == libc::EINTR => {
                    machine.vcpu().set_kvm_immediate_exit(0);
                }
                Err(error) => return Err(error).context("KVM_RUN"),
            }
        }
        let counter = machine.vcpu().get_regs().context("KVM_GET_REGS")?.rcx;
        let mut control = shared.lock();
        control.stopped = Some(counter);
        shared.changed.notify_all();
        while !control.run {
            control = shared.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        // Not before: whoever stops it again must find it stopped until then.
        control.stopped = None;
    }
}
