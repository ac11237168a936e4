//! Cold snapshots: the disks of a machine and what to boot them with.
//!
//! The disks are captured at one instant at which no request is half done, so
//! whoever boots them finds what a machine finds after its power went: all that
//! its guest had flushed, and any other write whole or not at all. The guest
//! of a running machine is asked to flush its page cache right before.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use coppice_engine::{CommitOptions, Committed, ImageRef, Name, Role, SnapshotId, SnapshotRecord};

use super::Supervisor;
use super::boots::gather_kernel;
use super::capture::{Gathered, alive, gather_disks, micros, recorded, recorded_rest};
use super::config::Recorded;
use super::deadline::in_time;
use super::freeze::PAUSE_LIMIT;
use super::machine::{Lineage, Live, Machine, State, lock};
use super::overlays::FrozenOverlay;
use crate::rpc::{Captured, Consistency};

/// How long the process of a machine that is over may take to let go of its
/// disks: other machines wait for it.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

impl Supervisor {
    /// Captures the disks of a machine.
    pub(crate) fn capture_cold(&self, machine: &Machine, name: Option<&str>) -> Result<Captured> {
        let begun = Instant::now();
        let name = name.map(|name| self.free_name(name)).transpose()?;
        let shown = name.as_ref().map(ToString::to_string);
        bootable(machine)?;
        let live = alive(machine)?;
        let flushed = machine.state() == State::Running && super::agent::flush(machine, &live);
        let turn = lock(&machine.turn);
        let below = self.lineage_of(&lock(&machine.descent).clone())?;
        let was_running = machine.state() == State::Running;
        let paused = Instant::now();
        let instant = self.freeze_only_disks(machine, &live, was_running)?;
        let pause_us = if was_running { micros(paused) } else { 0 };
        let overlays: Vec<_> = lock(&live.disks).iter().map(|stack| stack.frozen.clone()).collect();
        drop(turn);
        let (committed, record, dirty_pages) =
            self.commit_disks(machine, &overlays, &below, (name, &recorded(machine)))?;
        self.grow(machine, self.with_disks_of(&record, &below, instant)?);
        Ok(Captured {
            id: committed.id.to_string(),
            name: shown,
            pause_us,
            dirty_pages,
            logical_bytes: committed.logical_bytes,
            new_bytes: committed.new_bytes,
            stored_bytes: committed.stored_bytes,
            seconds: begun.elapsed().as_secs_f64(),
            consistency: if flushed { Consistency::Flushed } else { Consistency::Crash },
        })
    }

    /// Stores the disks of a machine that is over, whose process is still there.
    pub(super) fn store_disks(&self, machine: &Machine, live: &Live) -> Result<SnapshotId> {
        let kill = || live.vmm.kill();
        in_time(ANSWER_LIMIT, kill, || {
            live.vmm.pause(PAUSE_LIMIT)?;
            self.freeze_disks(machine, live)
        })?;
        let below = self.lineage_of(&lock(&machine.descent).clone())?;
        let overlays: Vec<_> = lock(&live.disks).iter().map(|stack| stack.frozen.clone()).collect();
        let shape = recorded_rest(machine)?;
        Ok(self.commit_disks(machine, &overlays, &below, (None, &shape))?.0.id)
    }

    /// Commits frozen overlays with what boots them; also says how many blocks
    /// they have.
    fn commit_disks(
        &self,
        machine: &Machine,
        overlays: &[Vec<Arc<FrozenOverlay>>],
        below: &Lineage,
        (name, shape): (Option<Name>, &Recorded),
    ) -> Result<(Committed, SnapshotRecord, u64)> {
        let mut session = self.store.begin()?;
        let mut gathered = Gathered::default();
        gather_disks(&mut session, overlays, below, &mut gathered)?;
        let kernel = machine.boots.as_ref().and_then(|boots| boots.kernel.as_deref());
        gather_kernel(&mut session, kernel, below, &mut gathered)?;
        let record = SnapshotRecord {
            images: gathered.images,
            config: super::config::encode(shape)?,
            parent: below.snapshot,
        };
        let options = CommitOptions { name, ..CommitOptions::default() };
        let committed = session.commit(&record, options)?;
        Ok((committed, record, gathered.dirty_pages))
    }

    /// Puts new overlays on the disks of a machine that stands still meanwhile.
    fn freeze_only_disks(
        &self,
        machine: &Machine,
        live: &Live,
        was_running: bool,
    ) -> Result<super::freeze::Instant> {
        if was_running {
            live.vmm.pause(PAUSE_LIMIT)?;
        }
        let frozen = self.freeze_disks(machine, live);
        if was_running {
            live.vmm.resume()?;
        }
        Ok(frozen?.0)
    }

    /// Later captures find the disks in the store; memory stays what it was
    /// built on before, and so does the parent.
    fn with_disks_of(
        &self,
        cold: &SnapshotRecord,
        below: &Lineage,
        instant: super::freeze::Instant,
    ) -> Result<Lineage> {
        let kernel = cold.image(Role::Stream).copied();
        let disks = (0u16..).map_while(|index| cold.image(Role::Disk(index)).copied());
        let disks: Vec<ImageRef> = disks.collect();
        let leased: Vec<ImageRef> =
            disks.iter().copied().chain(below.memory).chain(kernel).collect();
        let lease = Some(Arc::new(self.store.lease(&leased)?));
        Ok(Lineage {
            snapshot: below.snapshot,
            memory: below.memory,
            disks,
            kernel,
            lease,
            instant,
        })
    }
}

/// Refuses a machine whose disks nobody could boot.
pub(super) fn bootable(machine: &Machine) -> Result<()> {
    let name = &machine.name;
    if machine.config.disks.is_empty() {
        bail!("{name} has no disk, so nothing of it would be in a cold snapshot: leave out --cold");
    }
    if machine.boots.is_none() {
        bail!(
            "{name} comes from a snapshot of an older coppice, which did not keep the kernel: leave out --cold, or boot it anew with `coppice run --kernel`"
        );
    }
    Ok(())
}
