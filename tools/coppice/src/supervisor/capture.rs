//! Capturing a whole machine: memory, disks, CPU and devices, at one instant.
//!
//! The machine stands still while its changed pages are hashed and handed to
//! the store; it goes on before the store makes them durable. A failure at any
//! point leaves the machine running and the store as it was.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use coppice_engine::{
    CommitOptions, ErrorKind, ImageRef, ImageWriter, Name, Role, Session, SnapshotId,
    SnapshotRecord,
};
use coppice_runtime::protocol::{Content, PAGE_SIZE, PageRun, Region};

use super::Supervisor;
use super::machine::{Lineage, Live, Machine, State, lock};
use crate::rpc::Captured;

/// A machine that cannot be paused within this time goes on.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);

/// Bytes read from a machine at once.
const BATCH: usize = 4 << 20;

/// What a capture gathered while the machine stood still.
struct Gathered {
    images: Vec<(Role, ImageRef)>,
    dirty_pages: u64,
}

impl Supervisor {
    /// Captures a machine into the store.
    pub(crate) fn capture(&self, machine: &Machine, name: Option<&str>) -> Result<Captured> {
        let begun = Instant::now();
        let name = name.map(|name| self.free_name(name)).transpose()?;
        let _turn = lock(&machine.turn);
        let live = alive(machine)?;
        let was_running = machine.state() == State::Running;
        let lineage = lock(&machine.lineage).clone();
        let mut session = self.store.begin()?;

        let paused = Instant::now();
        if was_running {
            live.vmm.pause(PAUSE_LIMIT)?;
        }
        let gathered = gather(&live, &lineage, &mut session, machine.config.memory_bytes);
        if was_running {
            live.vmm.resume().context("the machine was captured but cannot go on")?;
        }
        let pause_us = if was_running { micros(paused) } else { 0 };

        let gathered = gathered?;
        let record = SnapshotRecord {
            images: gathered.images.clone(),
            config: super::config::encode(&machine.config, machine.nets.len())?,
            parent: lineage.snapshot,
        };
        let commit = CommitOptions { name, ..CommitOptions::default() };
        let name = commit.name.as_ref().map(ToString::to_string);
        let committed = session.commit(&record, commit)?;
        match self.next_lineage(&gathered, committed.id) {
            Ok(next) => *lock(&machine.lineage) = next,
            // It was removed and collected at once: the next capture builds
            // on what this one was built on.
            Err(error) => tracing::warn!(machine = machine.name, %error, "no new lineage"),
        }
        Ok(Captured {
            id: committed.id.to_string(),
            name,
            pause_us,
            dirty_pages: gathered.dirty_pages,
            logical_bytes: committed.logical_bytes,
            new_bytes: committed.new_bytes,
            stored_bytes: committed.stored_bytes,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    /// Later captures build on this one: whatever differs from it is among
    /// the pages that differ from the machine's origin.
    fn next_lineage(&self, gathered: &Gathered, id: SnapshotId) -> Result<Lineage> {
        let image =
            |role| gathered.images.iter().find(|(r, _)| *r == role).map(|(_, image)| *image);
        let disks: Vec<ImageRef> = (0u16..).map_while(|index| image(Role::Disk(index))).collect();
        let memory = image(Role::Memory);
        let leased: Vec<ImageRef> = disks.iter().copied().chain(memory).collect();
        let lease = Some(std::sync::Arc::new(self.store.lease(&leased)?));
        Ok(Lineage { snapshot: Some(id), memory, disks, lease })
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
        use std::os::unix::fs::FileExt;
        let _turn = lock(&machine.turn);
        let live = alive(machine)?;
        if machine.state() != State::Paused {
            bail!("{} runs: `coppice pause {}` first", machine.name, machine.name);
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

/// The process of a machine that has one, or an error that says why not.
pub(crate) fn alive(machine: &Machine) -> Result<std::sync::Arc<Live>> {
    let state = machine.state();
    match (state.reason(), machine.live()) {
        (None, Some(live)) => Ok(live),
        (reason, _) => bail!(
            "{} is {}: {}; `coppice rm {}` removes it",
            machine.name,
            state.word(),
            reason.unwrap_or("its process has ended"),
            machine.name
        ),
    }
}

fn gather(live: &Live, lineage: &Lineage, session: &mut Session, memory: u64) -> Result<Gathered> {
    let saved = live.vmm.save()?;
    let (image, mut dirty_pages) = capture_memory(live, lineage, session, memory)?;
    let mut images = vec![(Role::Memory, image)];
    for (index, runs) in saved.overlays.iter().enumerate() {
        let base = lineage.disks.get(index).context("the machine has a disk of no origin")?;
        let overlay = live.overlays.get(index).context("a disk has no overlay")?;
        let image = capture_disk(session, base, overlay, runs)?;
        images.push((Role::Disk(u16::try_from(index)?), image));
        dirty_pages += runs.iter().map(|run| run.count).sum::<u64>();
    }
    images.push((Role::State, session.blob(&saved.state)?));
    Ok(Gathered { images, dirty_pages })
}

/// Memory as its base image with the machine's own pages on top.
fn capture_memory(
    live: &Live,
    lineage: &Lineage,
    session: &mut Session,
    len: u64,
) -> Result<(ImageRef, u64)> {
    let mut writer = session.image(len, lineage.memory.as_ref())?;
    let mut pages = 0;
    for region in memory_regions(live) {
        let runs = live.built.pagemap.dirty(region.address..region.address + region.len)?;
        for run in runs {
            let first = region.offset / PAGE_SIZE + run.first;
            let address = region.address + run.first * PAGE_SIZE;
            let read = |offset: u64, piece: &mut [u8]| {
                Ok(live.built.memory.read(address + offset, piece)?)
            };
            write_run(&mut writer, PageRun { first, count: run.count }, len, read)?;
            pages += run.count;
        }
    }
    Ok((writer.finish()?, pages))
}

/// A disk as its base image with the overlay's blocks on top.
fn capture_disk(
    session: &mut Session,
    base: &ImageRef,
    overlay: &std::fs::File,
    runs: &[PageRun],
) -> Result<ImageRef> {
    use std::os::unix::fs::FileExt;
    let mut writer = session.image(base.len, Some(base))?;
    for run in runs {
        let read = |offset: u64, piece: &mut [u8]| {
            Ok(overlay.read_exact_at(piece, run.first * PAGE_SIZE + offset)?)
        };
        write_run(&mut writer, *run, base.len, read)?;
    }
    Ok(writer.finish()?)
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

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
