//! Taking hold of a machine at one instant while it goes on.
//!
//! The machine stands still only to stop its vCPUs and devices, to have the
//! pages that it wrote found and protected, to save its state and to put new
//! overlays on its disks. What it held at that instant is then copied or
//! stored while it runs.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use coppice_runtime::host::SavedMachine;
use coppice_runtime::protocol::{Content, PAGE_SIZE, PageRun};

use super::Supervisor;
use super::capture::alive;
use super::machine::{Descent, Live, Machine, State, lock};
use super::overlays::FrozenOverlay;
use super::pools::Pool;

/// A machine that cannot be stopped within this time goes on, uncaptured.
pub(crate) const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// Layers that may lie under a machine; with more, forking goes through the
/// store, which makes them one image.
const LAYERS_MAX: usize = 48;

/// Overlays that may lie under a disk of a child.
const OVERLAYS_MAX: usize = 48;

/// Orders the captures of all machines in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Instant(pub(crate) u64);

/// A machine at one instant.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) instant: Instant,
    /// Everything but memory and disks.
    pub(crate) state: Vec<u8>,
    /// The pages that it had written since it began.
    pub(crate) layer: Arc<Pool>,
    pub(crate) runs: Vec<PageRun>,
    /// The pages that its guest has ever freed: zero, unless they are among those.
    pub(crate) freed: Vec<PageRun>,
    /// The overlays of each disk, the oldest first.
    pub(crate) disks: Vec<Vec<Arc<FrozenOverlay>>>,
    /// The kernel that it was booted with, if a file still has it.
    pub(crate) kernel: Option<Arc<File>>,
    /// How long it stood still because of this.
    pub(crate) pause_us: u64,
}

impl Supervisor {
    /// Freezes a machine for being forked, unless that has to go through the
    /// store: because too much lies under it already, or because memory is
    /// short.
    pub(crate) fn freeze_for_fork(&self, machine: &Machine) -> Result<Option<(Frozen, Descent)>> {
        let _turn = lock(&machine.turn);
        let live = alive(machine)?;
        let overlays = lock(&live.disks).iter().map(|stack| stack.frozen.len()).max();
        let deep = live.memory.layers() >= LAYERS_MAX || overlays.unwrap_or(0) >= OVERLAYS_MAX;
        if deep || !self.has_room(machine, &live)? {
            return Ok(None);
        }
        let descent = lock(&machine.descent).clone();
        Ok(Some((self.freeze(machine, &live)?, descent)))
    }

    /// Freezes a machine. Only in its turn.
    pub(crate) fn freeze(&self, machine: &Machine, live: &Live) -> Result<Frozen> {
        let memory = memory_of(live, machine)?;
        let descriptors = [live.built.pagemap.as_fd(), live.built.memory.as_fd()];
        let layer = self.pools.open_layer(
            &live.pager,
            machine.key,
            &memory,
            (live.memory.pools(), descriptors),
        )?;
        let was_running = machine.state() == State::Running;
        let begun = std::time::Instant::now();
        if was_running {
            live.vmm.pause(PAUSE_LIMIT)?;
        }
        let stopped = self.freeze_stopped(machine, live, &layer);
        if was_running {
            live.vmm.resume().context("the machine was frozen but cannot go on")?;
        }
        let pause_us = if was_running { u64::try_from(begun.elapsed().as_micros())? } else { 0 };
        let (instant, SavedMachine { state, freed, .. }) = stopped?;
        live.pager.clear_layer(layer.id, freed.clone())?;
        let runs = live.pager.layer_runs(layer.id)?;
        let disks = lock(&live.disks).iter().map(|stack| stack.frozen.clone()).collect();
        let kernel = machine.boots.as_ref().and_then(|boots| boots.kernel.clone());
        Ok(Frozen { instant, state, layer, runs, freed, disks, kernel, pause_us })
    }

    fn freeze_stopped(
        &self,
        machine: &Machine,
        live: &Live,
        layer: &Arc<Pool>,
    ) -> Result<(Instant, SavedMachine)> {
        live.pager.freeze(layer.id, room_pages()?)?;
        // Before it goes on, so that nobody ends it unaware of this.
        let mut layers = lock(&machine.layers);
        layers.retain(|layer| layer.strong_count() > 1);
        layers.push(Arc::downgrade(layer));
        drop(layers);
        self.freeze_disks(machine, live)
    }

    /// Saves the state of a machine that stands still, and puts new overlays
    /// on its disks.
    pub(crate) fn freeze_disks(
        &self,
        machine: &Machine,
        live: &Live,
    ) -> Result<(Instant, SavedMachine)> {
        let mut disks = lock(&live.disks);
        let spares = (0..)
            .zip(disks.iter())
            .map(|(index, stack)| stack.spare(machine, index))
            .collect::<Result<Vec<_>>>()?;
        let borrowed: Vec<_> = spares.iter().map(AsFd::as_fd).collect();
        let mut saved = live.vmm.freeze(&borrowed)?;
        let instant = Instant(self.next_key());
        for ((stack, runs), spare) in
            disks.iter_mut().zip(std::mem::take(&mut saved.overlays)).zip(spares)
        {
            stack.freeze(instant, runs, spare);
        }
        Ok((instant, saved))
    }

    /// Whether memory has room for what the machine has written, once more.
    pub(crate) fn has_room(&self, machine: &Machine, live: &Live) -> Result<bool> {
        let written = live.built.pagemap.count(memory_of(live, machine)?)?.private;
        Ok(written <= room_pages()?)
    }
}

/// Where a machine's memory lies in its process.
pub(super) fn memory_of(live: &Live, machine: &Machine) -> Result<std::ops::Range<u64>> {
    let memory = live.built.regions.iter().filter(|region| region.content == Content::Memory);
    let start = memory.map(|region| region.address).min().context("the machine has no memory")?;
    Ok(start..start + machine.config.memory_bytes)
}

/// Three quarters of the host's available memory, in pages.
fn room_pages() -> Result<u64> {
    Ok(crate::host_memory::available()? / PAGE_SIZE / 4 * 3)
}
