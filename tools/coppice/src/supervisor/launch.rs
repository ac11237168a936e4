//! Making machines: by booting a kernel, or by continuing from a snapshot.

use std::fs::File;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use coppice_engine::{Entry, ImageRef, Role};
use coppice_runtime::host::{Built, News, Pager, PeerError, Vmm};
use coppice_runtime::protocol::{
    Content, DiskConfig, MachineConfig, MachineKey, PAGE_SIZE, PoolId, Region, Start, VmmEvent,
};

use super::boots::Boots;
use super::config::Recorded;
use super::freeze::Frozen;
use super::machine::{Descent, Identity, Lineage, Live, Machine, State, lock};
use super::memory_map::MemoryMap;
use super::net::Net;
use super::overlays::{FrozenOverlay, Stack};
use super::pools::Pool;
use super::rest::Kept;
use super::table::Reserved;
use super::trunk::Trunk;
use super::working_sets::Recall;
use super::{Supervisor, net};
use crate::cable::Cable;
use crate::rpc::{Boot, Fork, Forked, Progress, Ready};

/// What the kernel is told when the caller does not say otherwise.
const DEFAULT_CMDLINE: &str =
    "console=ttyS0 quiet panic=-1 reboot=k root=/dev/vda rw init=/usr/sbin/coppice-agent";

/// Guest memory that a machine may have.
pub(crate) const MEMORY_MIB: RangeInclusive<u64> = 16..=1 << 20;
/// CPUs that a machine may have.
pub(crate) const VCPUS: RangeInclusive<u64> = 1..=64;
/// Forks that one request may make.
pub(crate) const FORKS: RangeInclusive<u64> = 1..=10_000;

/// Everything needed to make machines that begin alike.
pub(super) struct Template {
    config: MachineConfig,
    nets: Vec<Cable>,
    boots: Option<Boots>,
    pub(super) descent: Descent,
    pub(super) source: Option<String>,
    /// Set for the one machine that comes back.
    pub(super) kept: Option<Kept>,
    disks: Vec<Arc<Pool>>,
    /// What lies over each disk already.
    frozen: Vec<Vec<Arc<FrozenOverlay>>>,
    origin: Origin,
    /// What machines of this snapshot touch first.
    recall: Option<Recall>,
}

enum Origin {
    Kernel { cmdline: String, kernel: Arc<File> },
    Instant { state: Vec<u8>, memory: MemoryMap },
}

impl Supervisor {
    /// Boots a kernel.
    pub(crate) fn boot(&self, boot: &Boot, kernel: OwnedFd) -> Result<Forked> {
        let begun = Instant::now();
        check_shape(boot)?;
        net::check_count(&boot.nets)?;
        let reserved = match &boot.name {
            Some(name) => self.table.reserve(name)?,
            None => self.table.reserve_series("vm", 1)?.pop().context("no free machine name")?,
        };
        let images = boot
            .disks
            .iter()
            .map(|name| self.disk_image(name))
            .collect::<Result<Vec<ImageRef>>>()?;
        let lease = Some(Arc::new(self.store.lease(&images)?));
        let config = MachineConfig {
            memory_bytes: boot.memory_mib << 20,
            vcpus: boot.cpus,
            disks: images
                .iter()
                .map(|image| DiskConfig { len: image.len, read_only: false })
                .collect(),
        };
        let cmdline = boot.cmdline.clone().unwrap_or_else(|| DEFAULT_CMDLINE.to_owned());
        let kernel = self.keep_kernel(&File::from(kernel))?;
        let template = Template {
            config,
            nets: boot.nets.clone(),
            boots: Some(Boots { cmdline: cmdline.clone(), kernel: Some(Arc::clone(&kernel)) }),
            disks: self.pools_of(&images)?,
            frozen: vec![Vec::new(); images.len()],
            descent: Descent::Stored(Lineage {
                snapshot: None,
                memory: None,
                disks: images,
                kernel: None,
                lease,
                instant: super::freeze::Instant(0),
            }),
            source: boot.disks.first().cloned(),
            kept: None,
            origin: Origin::Kernel { cmdline, kernel },
            recall: None,
        };
        let (_, ready) = self.make(&template, reserved, begun, false)?;
        forked(vec![ready], 0, begun)
    }

    /// Starts machines that continue from a snapshot, or from a machine as it
    /// is now.
    pub(crate) fn fork(
        self: &Arc<Self>,
        fork: &Fork,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Forked> {
        within("--count", u64::from(fork.count), &FORKS)?;
        let machine = if fork.snapshot_only { None } else { self.table.find(&fork.source) };
        let begun = Instant::now();
        let Some(machine) = machine else {
            let template = self.template(&self.entry_for_start(fork)?, fork, None)?;
            let reserved = self.reserve_for(fork)?;
            let machines = self.make_or_none(&template, (fork, reserved), begun, report)?;
            return forked(machines, 0, begun);
        };
        if machine.state() == State::Suspended {
            let template = self.template(&self.rest_of(&machine)?, fork, Some(&machine.nets))?;
            let reserved = self.reserve_for(fork)?;
            let machines = self.make_or_none(&template, (fork, reserved), begun, report)?;
            return forked(machines, 0, begun);
        }
        let cables = (machine.nets.len(), fork.count);
        let nets = net::of_forks(&fork.source, cables, &fork.nets, Some(&machine.nets))?;
        // Names that are taken are no reason to freeze anything.
        let reserved = self.reserve_for(fork)?;
        if let Some(frozen) = self.freeze_for_fork(&machine)? {
            let forked = self.fork_live(&machine, frozen, (fork, reserved, nets), begun, report);
            if forked.is_err() {
                self.pools.close_layers();
            }
            return forked;
        }
        let captured = self.capture(&machine, None)?;
        let template =
            self.template(&self.store.lookup(&captured.id)?, fork, Some(&machine.nets))?;
        let machines = self.make_or_none(&template, (fork, reserved), begun, report)?;
        forked(machines, captured.pause_us, begun)
    }

    /// Starts children of a machine that goes on. They run before anything of
    /// it is in the store; that follows behind them.
    fn fork_live(
        self: &Arc<Self>,
        parent: &Arc<Machine>,
        frozen: (Frozen, Descent),
        (fork, reserved, nets): (&Fork, Vec<Reserved<'_>>, Vec<Cable>),
        begun: Instant,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Forked> {
        let (frozen, descent) = frozen;
        let live = super::capture::alive(parent)?;
        let pages = parent.config.memory_bytes / PAGE_SIZE;
        let memory = live.memory.with_layer(
            &super::freed::covered(&frozen.runs, &frozen.freed),
            &frozen.layer,
            pages,
        )?;
        let parent_pause_us = frozen.pause_us;
        let (state, overlays) = (frozen.state.clone(), frozen.disks.clone());
        let trunk = Arc::new(Trunk::new(parent, descent, frozen));
        let template = Template {
            config: parent.config.clone(),
            nets,
            boots: parent.boots.clone(),
            source: Some(fork.source.clone()),
            kept: None,
            disks: live.disk_pools.clone(),
            frozen: overlays,
            origin: Origin::Instant { state, memory },
            recall: None,
            descent: Descent::Live(Arc::clone(&trunk)),
        };
        drop(live);
        let machines = self.make_or_none(&template, (fork, reserved), begun, report);
        drop(template);
        let machines = machines?;
        let me = Arc::clone(self);
        super::spawn("trunk", move || {
            me.store_trunk(&trunk);
            drop(trunk);
            me.pools.close_layers();
        })?;
        forked(machines, parent_pause_us, begun)
    }

    fn entry_for_start(&self, fork: &Fork) -> Result<Entry> {
        self.store.lookup(&fork.source).map_err(|error| {
            if error.kind() == coppice_engine::ErrorKind::NotFound {
                let what = if fork.snapshot_only { "snapshot" } else { "machine or snapshot" };
                anyhow::anyhow!(
                    "there is no {what} named {}: `coppice ps` lists machines, `coppice snapshots` lists snapshots",
                    fork.source
                )
            } else {
                error.into()
            }
        })
    }

    fn reserve_for(&self, fork: &Fork) -> Result<Vec<Reserved<'_>>> {
        match &fork.name {
            Some(name) if fork.count == 1 => Ok(vec![self.table.reserve(name)?]),
            Some(prefix) => self.table.reserve_series(prefix, fork.count),
            None => self.table.reserve_series(&machine_prefix(&fork.source), fork.count),
        }
    }

    fn disk_image(&self, name: &str) -> Result<ImageRef> {
        let entry = self.store.lookup(name).map_err(|error| {
            if error.kind() == coppice_engine::ErrorKind::NotFound {
                anyhow::anyhow!(
                    "there is no disk named {name}: `coppice import FILE --name {name}` brings one in"
                )
            } else {
                error.into()
            }
        })?;
        match find_image(&entry, Role::Disk(0)) {
            Some(image) => Ok(image),
            None => bail!("{name} is not a disk: `coppice show {name}` says what it holds"),
        }
    }

    fn pools_of(&self, images: &[ImageRef]) -> Result<Vec<Arc<Pool>>> {
        images.iter().map(|image| self.pools.get(image, &self.store, &self.pager()?)).collect()
    }

    pub(super) fn template(
        &self,
        entry: &Entry,
        fork: &Fork,
        parent: Option<&[Cable]>,
    ) -> Result<Template> {
        let source = fork.source.as_str();
        let kind = super::catalog::kind(entry);
        if kind != "machine" && kind != "cold" {
            bail!(
                "{source} is not a machine: start it with `coppice run --kernel K --disk {source}`"
            );
        }
        let Recorded { machine: config, nets, cmdline, rest: _ } =
            super::config::decode(&entry.record.config)?;
        let nets = net::of_forks(source, (nets, fork.count), &fork.nets, parent)?;
        let images: Vec<ImageRef> = (0..config.disks.len())
            .map(|index| {
                let role = Role::Disk(u16::try_from(index)?);
                find_image(entry, role)
                    .with_context(|| format!("snapshot {source} lacks disk {index}"))
            })
            .collect::<Result<_>>()?;
        let memory = find_image(entry, Role::Memory);
        let kernel = find_image(entry, Role::Stream);
        let leased: Vec<ImageRef> = entry.record.images.iter().map(|(_, image)| *image).collect();
        let lease = Some(Arc::new(self.store.lease(&leased)?));
        let origin = self.origin(entry, config.memory_bytes, cmdline.as_deref())?;
        let disks = self.pools_of(&images)?;
        let memory_pool = match &origin {
            Origin::Instant { memory, .. } => memory.pools().first(),
            Origin::Kernel { .. } => None,
        };
        let recall = self.working_sets.recall(entry.id, memory_pool, &disks, fork.prefetch);
        Ok(Template {
            boots: cmdline.map(|cmdline| Boots { cmdline, kernel: None }),
            config,
            nets,
            disks,
            recall: Some(recall),
            frozen: vec![Vec::new(); images.len()],
            descent: Descent::Stored(Lineage {
                snapshot: Some(entry.id),
                memory,
                disks: images,
                kernel,
                lease,
                instant: super::freeze::Instant(0),
            }),
            source: Some(source.to_owned()),
            kept: None,
            origin,
        })
    }

    /// The instant of a snapshot, or the kernel of one that has only disks.
    fn origin(&self, entry: &Entry, memory_bytes: u64, cmdline: Option<&str>) -> Result<Origin> {
        let find = |role| find_image(entry, role);
        match (find(Role::Memory), find(Role::State), find(Role::Stream), cmdline) {
            (Some(memory), Some(state), _, _) => {
                let pool = self.pools.get(&memory, &self.store, &self.pager()?)?;
                let memory = MemoryMap::whole(memory_bytes / PAGE_SIZE, pool);
                Ok(Origin::Instant { state: self.read_blob(&state)?, memory })
            }
            (None, _, Some(kernel), Some(cmdline)) => {
                let kernel = self.stored_kernel(&kernel)?;
                Ok(Origin::Kernel { cmdline: cmdline.to_owned(), kernel })
            }
            _ => bail!("snapshot {} lacks a part of the machine", entry.id),
        }
    }

    /// Makes one machine and, unless it is to stay paused, lets it run.
    pub(super) fn make(
        &self,
        template: &Template,
        reserved: Reserved<'_>,
        begun: Instant,
        paused: bool,
    ) -> Result<(Arc<Machine>, Ready)> {
        let begun_ns = super::clock::monotonic_ns()?;
        let waited = begun.elapsed();
        let machine = Arc::new(self.prepare(template, &reserved.name)?);
        let entered_ns = match self.start(&machine, template, paused) {
            Ok(entered_ns) => entered_ns,
            Err(error) => return Err(self.discard(&machine, error)),
        };
        let spent_ns = entered_ns.map_or(0, |entered_ns| entered_ns.saturating_sub(begun_ns));
        let waited_ns = if paused { 0 } else { u64::try_from(waited.as_nanos())? };
        if let Err(error) = super::machine_file::write(&machine) {
            return Err(self.discard(&machine, error));
        }
        let name = reserved.name.clone();
        reserved.fill(Arc::clone(&machine));
        Ok((machine, Ready { name, ready_us: (spent_ns + waited_ns) / 1000 }))
    }

    pub(super) fn prepare(&self, template: &Template, name: &str) -> Result<Machine> {
        let Kept { machine_id, macs } = Kept::of(template.kept.as_ref(), template.nets.len())?;
        let folder = self.paths.machine(name);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        Ok(Machine {
            name: name.to_owned(),
            key: MachineKey(self.next_key()),
            folder,
            config: template.config.clone(),
            nets: template.nets.clone(),
            macs,
            boots: template.boots.clone(),
            source: template.source.clone(),
            releasing: Mutex::new(()),
            turn: Mutex::new(()),
            state: Mutex::new(State::Paused),
            descent: Mutex::new(template.descent.clone()),
            layers: Mutex::default(),
            live: Mutex::new(None),
            rest: Mutex::new(None),
            came_from: Mutex::new(None),
            discarded: AtomicBool::new(false),
            last_faults: Mutex::new(None),
            identity: Identity::new(super::agent::generation()?, machine_id),
        })
    }

    /// Starts the process, makes the machine in it, has its faults served and
    /// lets it run; returns when it entered the guest.
    pub(super) fn start(
        &self,
        machine: &Arc<Machine>,
        template: &Template,
        paused: bool,
    ) -> Result<Option<u64>> {
        let log = File::create(machine.folder.join("vmm.log"))
            .with_context(|| format!("cannot write in {}", machine.folder.display()))?;
        // Whoever starts the log again leaves no hole before what it then writes.
        let console = File::options()
            .create(true)
            .append(true)
            .read(true)
            .open(machine.folder.join("console.log"))?;
        if template.kept.is_none() {
            console.set_len(0)?;
        }
        let disks = (template.config.disks.iter().zip(&template.frozen).enumerate())
            .map(|(index, (disk, frozen))| Stack::new(machine, index, disk.len, frozen))
            .collect::<Result<Vec<Stack>>>()?;
        let nets = (template.nets.iter().zip(&machine.macs))
            .map(|(cable, mac)| Net::new(cable, *mac))
            .collect::<Result<Vec<Net>>>()?;
        if let Origin::Instant { .. } = template.origin {
            net::unplug(&nets)?;
        }
        let vmm = self.spawn_vmm(machine, &log)?;
        let built = build(&vmm, template, &console, (&disks, &nets))?;
        let pager = attach(self, machine, template, &built)?;
        let memory = match &template.origin {
            Origin::Instant { memory, .. } => memory.clone(),
            Origin::Kernel { .. } => MemoryMap::default(),
        };
        let (disks, disk_pools) = (Mutex::new(disks), template.disks.clone());
        let live = Arc::new(Live { vmm, built, pager, nets, disks, memory, disk_pools });
        *lock(&machine.live) = Some(Arc::clone(&live));
        if paused {
            self.working_sets.begin(machine.key, &live.pager, template.recall.as_ref());
            return Ok(None);
        }
        let entered_ns = live.vmm.resume()?;
        machine.now(State::Running);
        self.working_sets.begin(machine.key, &live.pager, template.recall.as_ref());
        match &template.origin {
            Origin::Kernel { .. } => net::plug(&live.nets)?,
            Origin::Instant { .. } => super::agent::plug_when_renewed(machine, &live)?,
        }
        Ok(Some(entered_ns))
    }

    fn spawn_vmm(&self, machine: &Arc<Machine>, log: &File) -> Result<Vmm> {
        let news = self.news.clone();
        let weak = Arc::downgrade(machine);
        let mut said_why = false;
        let vmm = Vmm::raise(self.nursery.take()?, &machine.name, log, move |event| {
            let Some(machine) = weak.upgrade() else { return };
            match event {
                News::Event(VmmEvent::Exited { reason, clean }) => {
                    said_why = true;
                    let how = if clean { State::Stopped(reason) } else { State::Failed(reason) };
                    machine.ended(how);
                    drop(news.send(machine));
                }
                News::Closed => {
                    if !said_why {
                        machine.ended(State::Failed(last_words(&machine)));
                    }
                    // Nobody listens only when the supervisor is ending.
                    drop(news.send(machine));
                }
            }
        })?;
        Ok(vmm)
    }

    /// Undoes a machine that could not be made, and says why it could not: the
    /// reason it gave itself, or that a page it needed is lost, if that is so.
    fn discard(&self, machine: &Arc<Machine>, error: anyhow::Error) -> anyhow::Error {
        machine.discarded.store(true, Ordering::Release);
        self.release(machine);
        if let Err(error) = std::fs::remove_dir_all(&machine.folder) {
            tracing::warn!(machine = machine.name, %error, "cannot remove its folder");
        }
        let gone = matches!(error.downcast_ref(), Some(PeerError::Gone { .. }));
        match machine.state() {
            State::Stopped(reason) | State::Failed(reason) if gone => {
                anyhow::anyhow!("{} cannot start: {reason}", machine.name)
            }
            _ => error,
        }
    }
}

/// Why a process ended that did not say why: the last line of its log.
fn last_words(machine: &Machine) -> String {
    match super::last_line(&machine.folder.join("vmm.log")) {
        Some(line) => format!("its process ended unexpectedly: {line}"),
        None => "its process ended unexpectedly".to_owned(),
    }
}

fn build(
    vmm: &Vmm,
    template: &Template,
    console: &File,
    (disks, nets): (&[Stack], &[Net]),
) -> Result<Built> {
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![console.as_fd()];
    for (pool, stack) in template.disks.iter().zip(disks) {
        descriptors.extend([pool.memory.as_fd(), stack.newest.as_fd()]);
        descriptors.extend(stack.frozen.iter().map(|overlay| overlay.file.as_fd()));
    }
    descriptors.extend(nets.iter().map(|net| net.tap.file().as_fd()));
    let start = match &template.origin {
        Origin::Kernel { cmdline, kernel } => {
            descriptors.push(kernel.as_fd());
            Start::Boot { cmdline: cmdline.clone() }
        }
        Origin::Instant { state, memory } => {
            descriptors.extend(memory.pools().iter().map(|pool| pool.memory.as_fd()));
            let runs = |stack: &Stack| stack.frozen.iter().map(|o| o.runs.clone()).collect();
            let frozen = disks.iter().map(runs).collect();
            Start::Restore { state: state.clone(), memory: memory.pieces().to_vec(), frozen }
        }
    };
    let nets = nets.iter().map(Net::config).collect();
    Ok(vmm.build(template.config.clone(), nets, start, &descriptors)?)
}

/// Has the page server answer the machine's faults; returns the page server.
fn attach(
    supervisor: &Supervisor,
    machine: &Machine,
    template: &Template,
    built: &Built,
) -> Result<Arc<Pager>> {
    let empty = MemoryMap::default();
    let memory = match &template.origin {
        Origin::Instant { memory, .. } => memory,
        Origin::Kernel { .. } => &empty,
    };
    let pool_of = |region: &Region| match region.content {
        Content::Memory => memory.pool_at(region.offset / PAGE_SIZE),
        Content::Disk(index) => template.disks.get(usize::try_from(index).ok()?),
    };
    let regions = built
        .regions
        .iter()
        .filter(|region| region.pooled)
        .map(|region| Some((pool_of(region)?.id, *region)))
        .collect::<Option<Vec<(PoolId, Region)>>>()
        .context("the machine has a mapping that no image fits")?;
    // The page server that made the pools: a later one does not know them.
    let pager = match memory.pools().iter().chain(&template.disks).next() {
        Some(pool) => Arc::clone(&pool.pager),
        None => supervisor.pager()?,
    };
    pager.attach(machine.key, regions, &built.userfault)?;
    Ok(pager)
}

fn forked(machines: Vec<Ready>, parent_pause_us: u64, begun: Instant) -> Result<Forked> {
    let all_ready_us = u64::try_from(begun.elapsed().as_micros())?;
    Ok(Forked { machines, parent_pause_us, all_ready_us })
}

fn check_shape(boot: &Boot) -> Result<()> {
    within("--memory (in MiB)", boot.memory_mib, &MEMORY_MIB)?;
    within("--cpus", u64::from(boot.cpus), &VCPUS)
}

/// The command line refuses other numbers too, but anyone can write to the
/// socket.
fn within(what: &str, number: u64, allowed: &RangeInclusive<u64>) -> Result<()> {
    if allowed.contains(&number) {
        return Ok(());
    }
    bail!("{what} must be between {} and {}, not {number}", allowed.start(), allowed.end())
}

/// The image in one of a snapshot's places.
pub(crate) fn find_image(entry: &Entry, role: Role) -> Option<ImageRef> {
    entry.record.image(role).copied()
}

/// A machine name made from a snapshot's, which may hold other characters.
fn machine_prefix(source: &str) -> String {
    let clean: String = source
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' })
        .take(40)
        .collect();
    clean.trim_matches('-').to_owned()
}
