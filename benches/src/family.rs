//! The processes of the forks, as the bench sees them.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use coppice_runtime::Pagemap;
use coppice_runtime::host::Program;
use coppice_runtime::sys::channel::Channel;

use crate::orders::{Answer, Kind, Order};

/// This program in another role.
pub fn program(role: &[&str]) -> Result<Program> {
    let path = std::env::current_exe().context("the path of this program")?;
    Ok(Program { path, arguments: role.iter().map(Into::into).collect() })
}

/// Where the other processes print to.
pub fn log() -> Result<File> {
    Ok(File::from(std::io::stderr().as_fd().try_clone_to_owned()?))
}

/// The memory of a fork.
#[derive(Debug)]
pub struct Mapped {
    /// Where it lies in the fork's process.
    pub address: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The process's pagemap.
    pub pagemap: Pagemap,
    /// The same, to be handed on, and its memory.
    pub descriptors: [OwnedFd; 2],
    /// Its userfaultfd, unless the memory is bare.
    pub userfault: Option<Arc<OwnedFd>>,
}

/// The process of one fork. Dropping it ends it.
#[derive(Debug)]
pub struct Fork {
    child: Child,
    channel: Channel,
}

impl Fork {
    /// Starts a process that waits for orders.
    pub fn start() -> Result<Self> {
        let (child, channel) = program(&["fork"])?.start("a fork", &log()?)?;
        Ok(Self { child, channel })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order and waits for the answer.
    pub fn order(
        &self,
        order: &Order,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>)> {
        self.channel.send(order, descriptors)?;
        match self.channel.receive()? {
            (Answer::Failed(reason), _) => bail!("a fork could not: {reason}"),
            received => Ok(received),
        }
    }

    /// Makes a machine with memory.
    pub fn map(&self, kind: Kind, memory: Option<BorrowedFd<'_>>) -> Result<Mapped> {
        let (answer, descriptors) = self.order(&Order::Map(kind), memory.as_slice())?;
        let Answer::Mapped { address, len } = answer else { bail!("unexpected {answer:?}") };
        let mut descriptors = descriptors.into_iter();
        let table = descriptors.next().context("a pagemap")?;
        let memory = descriptors.next().context("its memory")?;
        let pagemap = Pagemap::new(table.try_clone()?);
        let userfault = descriptors.next().map(Arc::new);
        Ok(Mapped { address, len, pagemap, descriptors: [table, memory], userfault })
    }

    /// Reads pages from the host's side; nanoseconds for each.
    pub fn touch(&self, first: u64, stride: u64, count: u64) -> Result<Vec<u64>> {
        match self.order(&Order::Touch { first, stride, count }, &[])?.0 {
            Answer::Touched { ns } => Ok(ns),
            other => bail!("unexpected {other:?}"),
        }
    }

    /// Lets the guest walk; nanoseconds.
    pub fn walk(&self, walk: crate::guest::Walk) -> Result<u64> {
        match self.order(&Order::Walk(walk), &[])?.0 {
            Answer::Walked { ns } => Ok(ns),
            other => bail!("unexpected {other:?}"),
        }
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        // The process may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
