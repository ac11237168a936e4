//! Machines that are off the host.
//!
//! A machine that is paused off the host, or that was shut down, has no process:
//! all that it is lies in the store, as a snapshot without a name, and its
//! `machine.json` says which. So it survives its supervisor. The snapshot cannot
//! be removed while it is needed. A machine that is back keeps it, to fall back to
//! if it fails, until it is off the host or shut down again; then it leaves the
//! catalog, unless somebody gave it a name meanwhile.
//!
//! What comes back is the same machine, no fork of it: its machine id and its
//! ethernet addresses stay.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use coppice_engine::{CommitOptions, Entry, Role, SnapshotId, SnapshotRecord};

use super::Supervisor;
use super::capture::alive;
use super::freeze::PAUSE_LIMIT;
use super::launch::find_image;
use super::machine::{Descent, Live, Machine, State, lock};
use crate::rpc::{Captured, Consistency, Fork, Ready};

/// What is one machine's for its life.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) machine_id: String,
    pub(super) macs: Vec<[u8; 6]>,
}

impl Kept {
    /// Of a machine that comes back, or of a new one.
    pub(super) fn of(back: Option<&Self>, nets: usize) -> Result<Self> {
        if let Some(kept) = back {
            return Ok(kept.clone());
        }
        let macs = (0..nets).map(|_| super::net::new_mac()).collect::<Result<_>>()?;
        Ok(Self { machine_id: super::agent::machine_id()?, macs })
    }
}

impl Supervisor {
    /// Takes a machine off the host: memory, disks and CPUs go into the store
    /// and its process ends. One that cannot be stored goes on.
    pub(crate) fn suspend(&self, machine: &Machine) -> Result<()> {
        let _turn = lock(&machine.turn);
        if machine.state() == State::Suspended {
            return Ok(());
        }
        let live = alive(machine)?;
        let was_running = machine.state() == State::Running;
        if was_running {
            live.vmm.pause(PAUSE_LIMIT)?;
            machine.now(State::Paused);
        }
        let stored = self.store_still(machine, &live).and_then(|id| self.settle(machine, id));
        if let Err(error) = stored {
            if was_running {
                live.vmm.resume().context("the machine was not stored and cannot go on")?;
                machine.now(State::Running);
            }
            return Err(error);
        }
        drop(live);
        self.release(machine);
        Ok(())
    }

    /// Records durably that a snapshot is all there is of a machine.
    fn settle(&self, machine: &Machine, id: SnapshotId) -> Result<()> {
        *lock(&machine.rest) = Some(id);
        let before = lock(&machine.came_from).take();
        machine.now(State::Suspended);
        let recorded = match machine.state() {
            State::Suspended => super::machine_file::write(machine),
            other => Err(anyhow::anyhow!("{} is {} now", machine.name, other.word())),
        };
        if recorded.is_ok() {
            self.leave(before, machine);
        } else {
            *lock(&machine.came_from) = before;
            let refused = lock(&machine.rest).take();
            self.leave(refused, machine);
            // The file may say already that it is suspended.
            if let Err(error) = super::machine_file::write(machine) {
                tracing::error!(machine = machine.name, %error, "cannot record that it goes on");
            }
            let mut state = lock(&machine.state);
            if *state == State::Suspended {
                *state = State::Paused;
            }
        }
        recorded
    }

    /// Keeps the disks of a machine that ended in good order, so that it can
    /// be started again. Its process is still there.
    pub(super) fn keep_disks(&self, machine: &Machine, live: &Live) {
        let in_order = matches!(machine.state(), State::Stopped(_));
        let bootable = machine.boots.is_some() && !machine.config.disks.is_empty();
        if !in_order || !bootable || machine.discarded.load(Ordering::Acquire) {
            return;
        }
        match self.store_disks(machine, live) {
            Ok(id) => *lock(&machine.rest) = Some(id),
            Err(error) => {
                tracing::warn!(machine = machine.name, %error, "its disks are not kept");
            }
        }
    }

    /// Brings a machine back: it goes on where it was, or boots from its disks.
    pub(crate) fn come_back(&self, machine: &Arc<Machine>) -> Result<Ready> {
        let begun = std::time::Instant::now();
        let _turn = lock(&machine.turn);
        // Whoever lets its process go must be done with its files.
        drop(lock(&machine.releasing));
        let entry = self.rest_of(machine)?;
        let fork = Fork {
            source: machine.name.clone(),
            count: 1,
            name: None,
            paused: false,
            snapshot_only: true,
            nets: machine.nets.clone(),
            prefetch: true,
        };
        let mut template = self.template(&entry, &fork, None)?;
        template.source = machine.source.clone();
        template.kept = Some(Kept {
            machine_id: machine.identity.machine_id.clone(),
            macs: machine.macs.clone(),
        });
        if let (true, Descent::Stored(lineage)) = (entry.names.is_empty(), &mut template.descent) {
            // It leaves the catalog.
            lineage.snapshot = entry.record.parent;
        }
        let again = Arc::new(self.prepare(&template, &machine.name)?);
        *lock(&again.came_from) = Some(entry.id);
        // Durable before it runs: it is never taken for one that still rests.
        let started =
            super::machine_file::write(&again).and_then(|()| self.start(&again, &template, false));
        if let Err(error) = started {
            again.discarded.store(true, Ordering::Release);
            self.release(&again);
            super::machine_file::write(machine)?;
            return Err(error);
        }
        self.table.replace(machine, &again);
        let ready_us = u64::try_from(begun.elapsed().as_micros())?;
        Ok(Ready { name: machine.name.clone(), ready_us })
    }

    /// The snapshot that a machine without a process is.
    pub(super) fn rest_of(&self, machine: &Machine) -> Result<Entry> {
        let Some(id) = machine.left() else {
            // Says what it is instead.
            alive(machine)?;
            bail!("{} is {} already", machine.name, machine.state().word());
        };
        Ok(self.store.lookup(&id.to_string())?)
    }

    /// Takes a snapshot of a machine that does not need it out of the catalog,
    /// unless it has a name or another machine needs it.
    pub(super) fn leave(&self, id: Option<SnapshotId>, machine: &Machine) {
        let Some(id) = id else { return };
        let _alone = lock(&self.removing);
        if self.needed().contains(&id) {
            return;
        }
        let gone = self.store.lookup(&id.to_string()).and_then(|entry| {
            if entry.names.is_empty() {
                self.store.remove(&id.to_string()).map(drop)
            } else {
                Ok(())
            }
        });
        if let Err(error) = gone {
            tracing::warn!(machine = machine.name, %error, "its snapshot stays");
        }
    }

    /// Snapshots that machines are, or came from.
    fn needed(&self) -> HashSet<SnapshotId> {
        let of = |machine: Arc<Machine>| [*lock(&machine.rest), *lock(&machine.came_from)];
        self.table.list().into_iter().flat_map(of).flatten().collect()
    }

    /// Takes snapshots out of the catalog that were all there was of machines
    /// which are no more: their supervisor ended before it could do so.
    pub(super) fn leave_orphans(&self) {
        let needed = self.needed();
        for entry in self.store.snapshots() {
            let rests = super::config::decode(&entry.record.config)
                .is_ok_and(|recorded| recorded.rest.is_some());
            if rests && entry.names.is_empty() && !needed.contains(&entry.id) {
                let gone = self.store.remove(&entry.id.to_string());
                tracing::info!(id = %entry.id, is_gone = gone.is_ok(), "nobody needs it any more");
            }
        }
    }

    /// Machines that came from a snapshot which is gone have nothing to fall
    /// back to.
    pub(super) fn forget_fallback(&self, entry: &Entry) {
        if self.store.lookup(&entry.id.to_string()).is_ok() {
            return;
        }
        for machine in self.table.list() {
            let mut came_from = lock(&machine.came_from);
            if *came_from == Some(entry.id) {
                *came_from = None;
            }
        }
    }

    /// Refuses to let a snapshot go that is all there is of a machine.
    pub(super) fn check_unneeded(&self, entry: &Entry) -> Result<()> {
        let needed = |machine: &Arc<Machine>| *lock(&machine.rest) == Some(entry.id);
        match self.table.list().iter().find(|machine| needed(machine)) {
            Some(machine) if entry.names.len() < 2 => bail!(
                "it is all there is of {}, which is {}: `coppice rm {}` removes both",
                machine.name,
                machine.state().word(),
                machine.name
            ),
            _ => Ok(()),
        }
    }

    /// Names what a machine without a process is, whole or its disks.
    pub(super) fn name_rest(
        &self,
        machine: &Machine,
        (name, cold): (Option<&str>, bool),
    ) -> Result<Captured> {
        let begun = std::time::Instant::now();
        let _turn = lock(&machine.turn);
        let entry = self.rest_of(machine)?;
        let Some(name) = name else {
            bail!("{} is {}: give what it is a --name", machine.name, machine.state().word());
        };
        let free = self.free_name(name)?;
        let whole = find_image(&entry, Role::Memory).is_some();
        let (id, logical_bytes, stored_bytes) = if whole && cold {
            super::cold::bootable(machine)?;
            let cold = |role: &Role| matches!(role, Role::Disk(_) | Role::Stream);
            let images = entry.record.images.iter().filter(|(role, _)| cold(role)).copied();
            let record = SnapshotRecord { images: images.collect(), ..entry.record.clone() };
            let options = CommitOptions { name: Some(free), ..CommitOptions::default() };
            let done = self.store.begin()?.commit(&record, options)?;
            (done.id, done.logical_bytes, done.stored_bytes)
        } else if whole || cold {
            let named = self.store.tag(&entry.id.to_string(), free)?;
            (named.id, named.record.images.iter().map(|(_, image)| image.len).sum(), 0)
        } else {
            bail!("{} is stopped, so only its disks can be captured: use --cold", machine.name);
        };
        Ok(Captured {
            id: id.to_string(),
            name: Some(name.to_owned()),
            pause_us: 0,
            dirty_pages: 0,
            logical_bytes,
            new_bytes: 0,
            stored_bytes,
            seconds: begun.elapsed().as_secs_f64(),
            consistency: match (cold, whole) {
                (false, _) => Consistency::Whole,
                (true, true) => Consistency::Crash,
                (true, false) => Consistency::Stopped,
            },
        })
    }
}
