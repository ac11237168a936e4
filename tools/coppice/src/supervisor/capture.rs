//! Capturing a whole machine: memory, disks, CPU and devices, at one instant.
//!
//! The machine stands still only while it is frozen (`freeze`). What it held is
//! stored while it goes on, and the command answers when that is durable. A
//! failure at any point leaves the machine running and the store as it was.

use std::os::unix::fs::FileExt;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use coppice_engine::{
    CommitOptions, Committed, ErrorKind, ImageRef, ImageWriter, Name, Role, Session, SnapshotId,
    SnapshotRecord,
};
use coppice_runtime::protocol::{Content, PAGE_SIZE, PageRun, Region};

use super::Supervisor;
use super::boots::gather_kernel;
use super::config::Recorded;
use super::freed::{Taken, taken, write_zeros};
use super::freeze::{self, Frozen, PAUSE_LIMIT};
use super::machine::{Lineage, Live, Machine, State, lock};
use super::overlays::{FrozenOverlay, holders};
use crate::rpc::{Captured, Consistency};

/// Bytes read from a machine at once.
const BATCH: usize = 4 << 20;

/// Images that a session has so far, and how many pages and blocks of them
/// the machine had changed.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) images: Vec<(Role, ImageRef)>,
    pub(super) dirty_pages: u64,
}

/// A capture in the store.
pub(crate) struct Stored {
    pub(super) committed: Committed,
    dirty_pages: u64,
}

impl Supervisor {
    /// Captures a machine, or its disks, also one that has no process.
    pub(crate) fn snapshot(
        &self,
        machine: &Machine,
        name: Option<&str>,
        cold: bool,
    ) -> Result<Captured> {
        if lock(&machine.rest).is_some() {
            self.name_rest(machine, (name, cold))
        } else if cold {
            self.capture_cold(machine, name)
        } else {
            self.capture(machine, name)
        }
    }

    /// Captures a machine into the store.
    pub(crate) fn capture(&self, machine: &Machine, name: Option<&str>) -> Result<Captured> {
        let begun = Instant::now();
        let name = name.map(|name| self.free_name(name)).transpose()?;
        let shown = name.as_ref().map(ToString::to_string);
        let captured = self.capture_as(machine, name);
        // One that failed holds no layer any more either.
        self.pools.close_layers();
        let (stored, lineage, pause_us) = captured?;
        self.grow(machine, lineage);
        Ok(Captured {
            id: stored.committed.id.to_string(),
            name: shown,
            pause_us,
            dirty_pages: stored.dirty_pages,
            logical_bytes: stored.committed.logical_bytes,
            new_bytes: stored.committed.new_bytes,
            stored_bytes: stored.committed.stored_bytes,
            seconds: begun.elapsed().as_secs_f64(),
            consistency: Consistency::Whole,
        })
    }

    fn capture_as(&self, machine: &Machine, name: Option<Name>) -> Result<(Stored, Lineage, u64)> {
        let turn = lock(&machine.turn);
        let live = alive(machine)?;
        let descent = lock(&machine.descent).clone();
        if !self.has_room(machine, &live)? {
            let lineage = self.lineage_of(&descent)?;
            return self.capture_stopped(machine, &live, &lineage, (name, &recorded(machine)));
        }
        let frozen = self.freeze(machine, &live)?;
        drop(turn);
        let below = self.lineage_of(&descent)?;
        let (stored, lineage) = self.store_frozen(&recorded(machine), &frozen, &below, name)?;
        Ok((stored, lineage, frozen.pause_us))
    }

    /// Stores a frozen machine on top of the images that it continued.
    pub(crate) fn store_frozen(
        &self,
        shape: &Recorded,
        frozen: &Frozen,
        below: &Lineage,
        name: Option<Name>,
    ) -> Result<(Stored, Lineage)> {
        let (layer, memory_bytes) = (&frozen.layer, shape.machine.memory_bytes);
        layer.pager.wait_for_layer(layer.id).context("a page of the machine is lost")?;
        let memory = std::fs::File::from(layer.memory.try_clone()?);
        let mut session = self.store.begin()?;
        let mut gathered = Gathered::default();
        let mut writer = session.image(memory_bytes, below.memory.as_ref())?;
        for part in taken(&frozen.runs, &frozen.freed) {
            match part {
                Taken::Zero(run) => write_zeros(&mut writer, run)?,
                Taken::Own(run) => {
                    let read = |offset: u64, piece: &mut [u8]| {
                        Ok(memory.read_exact_at(piece, run.first * PAGE_SIZE + offset)?)
                    };
                    write_run(&mut writer, run, memory_bytes, read)?;
                    gathered.dirty_pages += run.count;
                }
            }
        }
        gathered.images.push((Role::Memory, writer.finish()?));
        gather_disks(&mut session, &frozen.disks, below, &mut gathered)?;
        gathered.images.push((Role::State, session.blob(&frozen.state)?));
        gather_kernel(&mut session, frozen.kernel.as_deref(), below, &mut gathered)?;
        self.commit(session, gathered, shape, below, (name, frozen.instant))
    }

    /// Captures a machine that has written more than memory has room for
    /// twice: it stands still until its pages are read.
    fn capture_stopped(
        &self,
        machine: &Machine,
        live: &Live,
        below: &Lineage,
        (name, shape): (Option<Name>, &Recorded),
    ) -> Result<(Stored, Lineage, u64)> {
        let mut session = self.store.begin()?;
        let was_running = machine.state() == State::Running;
        let paused = Instant::now();
        if was_running {
            live.vmm.pause(PAUSE_LIMIT)?;
        }
        let frozen = self.freeze_disks(machine, live).and_then(|(instant, saved)| {
            let memory = capture_memory((machine, live), below, &mut session, &saved.freed)?;
            Ok((memory, (instant, saved.state)))
        });
        if was_running {
            live.vmm.resume().context("the machine was captured but cannot go on")?;
        }
        let pause_us = if was_running { micros(paused) } else { 0 };
        let ((image, dirty_pages), (instant, state)) = frozen?;
        let mut gathered = Gathered { images: vec![(Role::Memory, image)], dirty_pages };
        let disks: Vec<_> = lock(&live.disks).iter().map(|stack| stack.frozen.clone()).collect();
        gather_disks(&mut session, &disks, below, &mut gathered)?;
        gathered.images.push((Role::State, session.blob(&state)?));
        let kernel = machine.boots.as_ref().and_then(|boots| boots.kernel.as_deref());
        gather_kernel(&mut session, kernel, below, &mut gathered)?;
        let (stored, lineage) = self.commit(session, gathered, shape, below, (name, instant))?;
        Ok((stored, lineage, pause_us))
    }

    fn commit(
        &self,
        session: Session,
        gathered: Gathered,
        shape: &Recorded,
        below: &Lineage,
        (name, instant): (Option<Name>, freeze::Instant),
    ) -> Result<(Stored, Lineage)> {
        let record = SnapshotRecord {
            images: gathered.images.clone(),
            config: super::config::encode(shape)?,
            parent: below.snapshot,
        };
        let commit = CommitOptions { name, ..CommitOptions::default() };
        let committed = session.commit(&record, commit)?;
        let lineage = match self.next_lineage(&gathered, committed.id, instant) {
            Ok(next) => next,
            // It was removed and collected at once: the next capture builds
            // on what this one was built on.
            Err(error) => {
                tracing::warn!(%error, "no new lineage");
                below.clone()
            }
        };
        Ok((Stored { committed, dirty_pages: gathered.dirty_pages }, lineage))
    }

    /// Later captures build on this one: whatever differs from it is among
    /// the pages that differ from the machine's origin.
    fn next_lineage(
        &self,
        gathered: &Gathered,
        id: SnapshotId,
        instant: freeze::Instant,
    ) -> Result<Lineage> {
        let image =
            |role| gathered.images.iter().find(|(r, _)| *r == role).map(|(_, image)| *image);
        let disks: Vec<ImageRef> = (0u16..).map_while(|index| image(Role::Disk(index))).collect();
        let (memory, kernel) = (image(Role::Memory), image(Role::Stream));
        let leased: Vec<ImageRef> = disks.iter().copied().chain(memory).chain(kernel).collect();
        let lease = Some(std::sync::Arc::new(self.store.lease(&leased)?));
        Ok(Lineage { snapshot: Some(id), memory, disks, kernel, lease, instant })
    }

    /// Stores all of a machine that stands still and will not go on.
    pub(super) fn store_still(&self, machine: &Machine, live: &Live) -> Result<SnapshotId> {
        let below = self.lineage_of(&lock(&machine.descent).clone())?;
        let (stored, _, _) =
            self.capture_stopped(machine, live, &below, (None, &recorded_rest(machine)?))?;
        Ok(stored.committed.id)
    }

    /// A name that the catalog does not have yet.
    pub(crate) fn free_name(&self, name: &str) -> Result<Name> {
        let parsed: Name = name.parse()?;
        match self.store.lookup(name) {
            Ok(entry) if entry.names.iter().any(|taken| *taken == parsed) => bail!(
                "a snapshot named {name} exists already: choose another --name, or remove it with `coppice rmi {name}`"
            ),
            Ok(_) => Ok(parsed),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(parsed),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes the memory of a machine that stands still to a file.
    pub(crate) fn dump_memory(&self, machine: &Machine, out: &std::fs::File) -> Result<u64> {
        let _turn = lock(&machine.turn);
        let live = alive(machine)?;
        if machine.state() != State::Paused {
            bail!("{} runs: `coppice pause --in-memory {}` first", machine.name, machine.name);
        }
        live.vmm.populate()?;
        out.set_len(machine.config.memory_bytes)?;
        let mut buffer = vec![0; BATCH];
        for region in memory_regions(&live) {
            let mut done = 0;
            while done < region.len {
                let len = usize::try_from(region.len - done)?.min(BATCH);
                let piece = &mut buffer[..len];
                live.built.memory.read(region.address + done, piece)?;
                out.write_all_at(piece, region.offset + done)?;
                done += u64::try_from(len)?;
            }
        }
        Ok(machine.config.memory_bytes)
    }
}

/// What a snapshot of a machine records of it.
pub(crate) fn recorded(machine: &Machine) -> Recorded {
    Recorded {
        machine: machine.config.clone(),
        nets: machine.nets.len(),
        cmdline: machine.boots.as_ref().map(|boots| boots.cmdline.clone()),
        rest: None,
    }
}

/// The same for the snapshot that is all there will be of it.
pub(super) fn recorded_rest(machine: &Machine) -> Result<Recorded> {
    let mut rest = [0; 16];
    getrandom::fill(&mut rest)?;
    Ok(Recorded { rest: Some(rest), ..recorded(machine) })
}

/// The process of a machine that has one, or an error that says why not.
pub(crate) fn alive(machine: &Machine) -> Result<std::sync::Arc<Live>> {
    let state = machine.state();
    let rests = machine.left().is_some();
    let name = &machine.name;
    match (state.reason(), machine.live()) {
        (None, Some(live)) => Ok(live),
        (None, None) if rests => bail!("{name} is suspended: `coppice resume {name}` first"),
        (Some(reason), _) if rests && matches!(state, State::Failed(_)) => bail!(
            "{name} is failed: {reason}; `coppice resume {name}` takes it back to where it last came from the store"
        ),
        (Some(reason), _) if rests => {
            bail!("{name} is stopped: {reason}; `coppice start {name}` boots it again")
        }
        (reason, _) => bail!(
            "{} is {}: {}; `coppice rm {}` removes it",
            machine.name,
            state.word(),
            reason.unwrap_or("its process has ended"),
            machine.name
        ),
    }
}

/// Memory as its base image with the machine's own pages on top, and zeros where
/// its guest has freed them.
fn capture_memory(
    (machine, live): (&Machine, &Live),
    lineage: &Lineage,
    session: &mut Session,
    freed: &[PageRun],
) -> Result<(ImageRef, u64)> {
    let (len, at) = (machine.config.memory_bytes, freeze::memory_of(live, machine)?);
    let mut writer = session.image(len, lineage.memory.as_ref())?;
    let mut pages = 0;
    for part in taken(&live.built.pagemap.dirty(at.clone())?, freed) {
        match part {
            Taken::Zero(run) => write_zeros(&mut writer, run)?,
            Taken::Own(run) => {
                let address = at.start + run.first * PAGE_SIZE;
                let read = |offset: u64, piece: &mut [u8]| {
                    Ok(live.built.memory.read(address + offset, piece)?)
                };
                write_run(&mut writer, run, len, read)?;
                pages += run.count;
            }
        }
    }
    Ok((writer.finish()?, pages))
}

/// Each disk as its base image with the blocks that were written since.
pub(super) fn gather_disks(
    session: &mut Session,
    disks: &[Vec<std::sync::Arc<FrozenOverlay>>],
    below: &Lineage,
    gathered: &mut Gathered,
) -> Result<()> {
    for (index, overlays) in disks.iter().enumerate() {
        let base = below.disks.get(index).context("the machine has a disk of no origin")?;
        let new: Vec<&FrozenOverlay> = overlays
            .iter()
            .map(AsRef::as_ref)
            .filter(|overlay| overlay.instant > below.instant)
            .collect();
        let mut writer = session.image(base.len, Some(base))?;
        for (run, holder) in holders(&new, base.len) {
            // Discarded blocks are holes.
            writer.write_overlay(&new[holder].file, run.first, run.count)?;
            gathered.dirty_pages += run.count;
        }
        gathered.images.push((Role::Disk(u16::try_from(index)?), writer.finish()?));
    }
    Ok(())
}

/// Copies a run of pages into an image, a batch at a time. `read` takes an
/// offset within the run.
fn write_run(
    writer: &mut ImageWriter<'_>,
    run: PageRun,
    image_len: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let start = run.first * PAGE_SIZE;
    let end = ((run.first + run.count) * PAGE_SIZE).min(image_len);
    let mut buffer = vec![0; BATCH.min(usize::try_from(end.saturating_sub(start))?)];
    let mut at = start;
    while at < end {
        let len = usize::try_from(end - at)?.min(BATCH);
        let piece = &mut buffer[..len];
        read(at - start, piece)?;
        writer.write(at / PAGE_SIZE, piece)?;
        at += u64::try_from(len)?;
    }
    Ok(())
}

/// The machine's memory mappings in the order of their offsets.
fn memory_regions(live: &Live) -> Vec<Region> {
    let mut regions: Vec<Region> = live
        .built
        .regions
        .iter()
        .filter(|region| region.content == Content::Memory)
        .copied()
        .collect();
    regions.sort_by_key(|region| region.offset);
    regions
}

pub(super) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
