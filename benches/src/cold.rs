//! Machines that are started cold: a program is executed, opens KVM, makes a
//! machine and lets it run. It does less than a fork does, as there is no state to load
//! and no jail.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::Child;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use coppice_runtime::protocol::{MachineConfig, Start, VmmMessage, VmmReply, VmmRequest};
use coppice_runtime::sys::channel::Channel;

use crate::child::inherited_channel;
use crate::family::{log, program};
use crate::kernel::{self, MEMORY_MIB, Orders};
use crate::product::Product;

/// The life of such a process.
pub fn run() -> Result<()> {
    let code = coppice_runtime::vmm_main(inherited_channel()?);
    anyhow::ensure!(code == std::process::ExitCode::SUCCESS, "the machine's process failed");
    Ok(())
}

/// A machine in a process of its own. Dropping it ends it.
#[derive(Debug)]
struct Cold {
    child: Child,
    channel: Channel,
}

impl Cold {
    /// Starts it; returns when its vCPU runs.
    fn start(kernel: &File, console: &File) -> Result<Self> {
        let (child, channel) = program(&["machine"])?.start("a machine", &log()?)?;
        let cold = Self { child, channel };
        let config = MachineConfig { memory_bytes: MEMORY_MIB << 20, vcpus: 1, disks: Vec::new() };
        let start = Start::Boot { cmdline: String::new() };
        let build = VmmRequest::Build { config, nets: Vec::new(), start };
        cold.channel.send(&build, &[console.as_fd(), kernel.as_fd()])?;
        cold.answer()?;
        cold.channel.send(&VmmRequest::Resume, &[])?;
        cold.answer()?;
        Ok(cold)
    }

    fn answer(&self) -> Result<VmmReply> {
        match self.channel.receive::<VmmMessage>()?.0 {
            VmmMessage::Reply(Ok(reply)) => Ok(reply),
            other => bail!("a cold machine: {other:?}"),
        }
    }
}

impl Drop for Cold {
    fn drop(&mut self) {
        // The process may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Starts `count` machines, on as many threads as there are CPUs; microseconds
/// until the last one's vCPU runs.
pub fn batch(product: &Product, count: usize) -> Result<u64> {
    let mut kernel = product.scratch("cold.elf")?;
    kernel.write_all(&kernel::elf(Orders::Idle))?;
    let console = product.scratch("cold.log")?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let begun = Instant::now();
    let some = |number: usize| {
        let share = (number..count).step_by(threads).count();
        (0..share).map(|_| Cold::start(&kernel, &console)).collect::<Result<Vec<Cold>>>()
    };
    let made: Vec<_> = std::thread::scope(|scope| {
        let some = &some;
        let threads: Vec<_> =
            (0..threads).map(|number| scope.spawn(move || some(number))).collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    let us = u64::try_from(begun.elapsed().as_micros())?;
    for machines in made {
        // Ended here, after all of them ran.
        drop(machines.ok().context("a thread panicked")??);
    }
    Ok(us)
}
