//! The process of one fork: it holds the machine and does what it is told.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use coppice_runtime::sys::channel::{Channel, ChannelError};
use coppice_runtime::sys::userfault::Userfault;
use kvm_ioctls::Kvm;

use crate::machine::{Assembly, Machine, Steps, Stopwatch};
use crate::mapping::Mapping;
use crate::orders::{Answer, Kind, Order};
use crate::runner::Runner;

/// The channel that a process gets as its standard input.
pub fn inherited_channel() -> Result<Channel> {
    let socket = rustix::io::dup(std::io::stdin().as_fd()).context("standard input")?;
    Ok(Channel::new(UnixStream::from(socket)))
}

/// Obeys until the bench closes the channel.
pub fn run() -> Result<()> {
    let channel = inherited_channel()?;
    let kvm = Kvm::new().context("/dev/kvm")?;
    let mut fork = Fork { kvm, assembly: None, userfault: None, machine: None, runner: None };
    loop {
        let (order, descriptors) = match channel.receive::<Order>() {
            Ok(received) => received,
            Err(ChannelError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let (answer, handed) = fork
            .obey(order, descriptors)
            .unwrap_or_else(|error| (Answer::Failed(format!("{error:#}")), Vec::new()));
        let borrowed: Vec<_> = handed.iter().map(AsFd::as_fd).collect();
        channel.send(&answer, &borrowed)?;
    }
}

struct Fork {
    kvm: Kvm,
    assembly: Option<Assembly>,
    /// Kept, or its ranges would no longer be registered.
    userfault: Option<Userfault>,
    machine: Option<Machine>,
    /// Has the machine once it runs by itself.
    runner: Option<Runner>,
}

/// A machine, and what its memory is registered with.
type Forked = (Machine, Option<Userfault>);

type Reply = (Answer, Vec<OwnedFd>);

impl Fork {
    fn obey(&mut self, order: Order, descriptors: Vec<OwnedFd>) -> Result<Reply> {
        let mut files = descriptors.into_iter().map(File::from);
        match order {
            Order::Race { rounds } => {
                let bare = files.next().context("a memory file")?;
                let pool = files.next().context("a pool")?;
                Ok((self.race(rounds, &bare, &pool)?, Vec::new()))
            }
            Order::Map(kind) => self.map(kind, files.next().as_ref()),
            Order::Run => {
                let assembly = self.assembly.take().context("memory is mapped first")?;
                let (machine, steps) = assembly.finish()?;
                self.machine = Some(machine);
                Ok((Answer::Running(steps), Vec::new()))
            }
            Order::Walk(walk) => {
                let machine = self.machine.as_mut().context("the machine runs first")?;
                Ok((Answer::Walked { ns: machine.walk(&walk)? }, Vec::new()))
            }
            Order::Begin(walk) => {
                let machine = self.machine.take().context("the machine runs first")?;
                machine.prepare(&walk)?;
                self.runner = Some(Runner::start(machine)?);
                Ok((Answer::Done, Vec::new()))
            }
            Order::Stop => {
                let runner = self.runner.as_ref().context("the guest walks first")?;
                Ok((Answer::Stopped { counter: runner.stop()? }, Vec::new()))
            }
            Order::GoOn => {
                self.runner.as_ref().context("the guest walks first")?.go_on();
                Ok((Answer::Done, Vec::new()))
            }
            Order::Touch { first, stride, count } => {
                let ns = touch(self.memory()?, first, stride, count)?;
                Ok((Answer::Touched { ns }, Vec::new()))
            }
            Order::Populate => {
                self.memory()?.populate_read().context("MADV_POPULATE_READ")?;
                Ok((Answer::Done, Vec::new()))
            }
        }
    }

    fn memory(&self) -> Result<&Mapping> {
        match (&self.machine, &self.assembly) {
            (Some(machine), _) => Ok(machine.memory()),
            (None, Some(assembly)) => assembly.memory().context("memory is mapped first"),
            (None, None) => bail!("memory is mapped first"),
        }
    }

    fn race(&self, rounds: u32, bare: &File, pool: &File) -> Result<Answer> {
        let (mut bares, mut pooled) = (Vec::new(), Vec::new());
        // All live until the end: a memslot waits for the machines that are
        // being taken down.
        let mut machines = Vec::new();
        for _ in 0..rounds {
            let (machine, steps) = self.fork_of(bare, false)?;
            bares.push(steps);
            machines.push(machine);
            let (machine, steps) = self.fork_of(pool, true)?;
            pooled.push(steps);
            machines.push(machine);
        }
        Ok(Answer::Raced { bare: bares, pooled })
    }

    /// Makes a machine. Nobody serves its faults: the pages of the first
    /// instruction are resident.
    fn fork_of(&self, file: &File, register: bool) -> Result<(Forked, Steps)> {
        let mut userfault = None;
        let (machine, steps) = Machine::fork(&self.kvm, || {
            let memory = Mapping::of(file)?;
            if register {
                userfault = Some(registered(&memory)?);
            }
            Ok(memory)
        })?;
        Ok(((machine, userfault), steps))
    }

    fn map(&mut self, kind: Kind, file: Option<&File>) -> Result<Reply> {
        let mut assembly = Assembly::default();
        assembly.create(&self.kvm)?;
        let mut userfault = None;
        let memory = assembly.map(|| {
            let memory = match kind {
                Kind::Anonymous { len } => Mapping::anonymous(usize::try_from(len)?)?,
                Kind::Bare | Kind::Pooled => Mapping::of(file.context("a file")?)?,
            };
            if kind != Kind::Bare {
                userfault = Some(registered(&memory)?);
            }
            Ok(memory)
        })?;
        let answer = Answer::Mapped { address: memory.address(), len: memory.len() as u64 };
        let mut handed = vec![
            OwnedFd::from(File::open("/proc/self/pagemap")?),
            OwnedFd::from(File::open("/proc/self/mem")?),
        ];
        if let Some(userfault) = &userfault {
            handed.push(userfault.as_fd().try_clone_to_owned()?);
        }
        self.assembly = Some(assembly);
        self.userfault = userfault;
        Ok((answer, handed))
    }
}

fn registered(memory: &Mapping) -> Result<Userfault> {
    let userfault = Userfault::new().context("userfaultfd")?;
    userfault.register(memory.address(), memory.len()).context("UFFDIO_REGISTER")?;
    Ok(userfault)
}

fn touch(memory: &Mapping, first: u64, stride: u64, count: u64) -> Result<Vec<u64>> {
    let mut taken = Vec::with_capacity(usize::try_from(count)?);
    for number in 0..count {
        let page = usize::try_from(first + number * stride)?;
        let mut watch = Stopwatch::start();
        std::hint::black_box(memory.read(page));
        taken.push(watch.lap_ns());
    }
    Ok(taken)
}
