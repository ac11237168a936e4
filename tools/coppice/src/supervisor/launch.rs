//! Making machines: by booting a kernel, or by continuing from a snapshot.

use std::fs::File;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use coppice_engine::{Entry, ImageRef, Role};
use coppice_runtime::host::{Built, News, PeerError, Vmm};
use coppice_runtime::pieces::Piece;
use coppice_runtime::protocol::{
    Content, DiskConfig, MachineConfig, MachineKey, PAGE_SIZE, PoolId, Region, Start, VmmEvent,
};

use super::config::Recorded;
use super::machine::{Identity, Lineage, Live, Machine, State, lock};
use super::net::Net;
use super::pools::Pool;
use super::table::Reserved;
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
struct Template {
    config: MachineConfig,
    nets: Vec<Cable>,
    lineage: Lineage,
    source: Option<String>,
    disks: Vec<Arc<Pool>>,
    origin: Origin,
}

enum Origin {
    Kernel { cmdline: String, kernel: OwnedFd },
    Instant { state: Vec<u8>, memory: Arc<Pool> },
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
        let template = Template {
            config,
            nets: boot.nets.clone(),
            disks: self.pools_of(&images)?,
            lineage: Lineage { snapshot: None, memory: None, disks: images, lease },
            source: boot.disks.first().cloned(),
            origin: Origin::Kernel { cmdline, kernel },
        };
        let ready = self.make(&template, reserved, begun, false)?;
        Ok(Forked { machines: vec![ready], parent_pause_us: 0 })
    }

    /// Starts machines that continue from a snapshot, or from a machine as it
    /// is now.
    pub(crate) fn fork(&self, fork: &Fork, report: &mut dyn FnMut(Progress)) -> Result<Forked> {
        within("--count", u64::from(fork.count), &FORKS)?;
        let machine = if fork.snapshot_only { None } else { self.table.find(&fork.source) };
        let begun = Instant::now();
        let (entry, parent_pause_us) = match &machine {
            Some(machine) => {
                let captured = self.capture(machine, None)?;
                (self.store.lookup(&captured.id)?, captured.pause_us)
            }
            None => (self.entry_for_start(fork)?, 0),
        };
        let parent = machine.as_ref().map(|machine| machine.nets.as_slice());
        let template = self.template(&entry, fork, parent)?;
        let mut machines = Vec::new();
        if let Err(error) = self.make_all(&template, fork, begun, &mut machines, report) {
            // All or nothing: nobody is told the names of a part.
            for made in machines {
                if let Err(error) = self.remove_machine(&made.name, true) {
                    tracing::warn!(machine = made.name, %error, "cannot remove it");
                }
            }
            return Err(error);
        }
        Ok(Forked { machines, parent_pause_us })
    }

    fn make_all(
        &self,
        template: &Template,
        fork: &Fork,
        begun: Instant,
        made: &mut Vec<Ready>,
        report: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        for reserved in self.reserve_for(fork)? {
            // The first is timed from the request; each later one from the
            // moment its turn came.
            let begun = if made.is_empty() { begun } else { Instant::now() };
            made.push(self.make(template, reserved, begun, fork.paused)?);
            report(Progress {
                what: "forking".to_owned(),
                done: u64::try_from(made.len())?,
                total: u64::from(fork.count),
                bytes: false,
                new_bytes: None,
            });
        }
        Ok(())
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

    fn template(&self, entry: &Entry, fork: &Fork, parent: Option<&[Cable]>) -> Result<Template> {
        let source = fork.source.as_str();
        let (Some(memory), Some(state)) =
            (find_image(entry, Role::Memory), find_image(entry, Role::State))
        else {
            bail!(
                "{source} is not a machine: start it with `coppice run --kernel K --disk {source}`"
            );
        };
        let Recorded { machine: config, nets } = super::config::decode(&entry.record.config)?;
        let nets = net::of_forks(source, (nets, fork.count), &fork.nets, parent)?;
        let images: Vec<ImageRef> = (0..config.disks.len())
            .map(|index| {
                let role = Role::Disk(u16::try_from(index)?);
                find_image(entry, role)
                    .with_context(|| format!("snapshot {source} lacks disk {index}"))
            })
            .collect::<Result<_>>()?;
        let leased: Vec<ImageRef> = images.iter().copied().chain([memory, state]).collect();
        let lease = Some(Arc::new(self.store.lease(&leased)?));
        let origin = Origin::Instant {
            state: self.read_blob(&state)?,
            memory: self.pools.get(&memory, &self.store, &self.pager()?)?,
        };
        Ok(Template {
            config,
            nets,
            disks: self.pools_of(&images)?,
            lineage: Lineage {
                snapshot: Some(entry.id),
                memory: Some(memory),
                disks: images,
                lease,
            },
            source: Some(source.to_owned()),
            origin,
        })
    }

    /// Makes one machine and, unless it is to stay paused, lets it run.
    fn make(
        &self,
        template: &Template,
        reserved: Reserved<'_>,
        begun: Instant,
        paused: bool,
    ) -> Result<Ready> {
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
        reserved.fill(machine);
        Ok(Ready { name, ready_us: (spent_ns + waited_ns) / 1000 })
    }

    fn prepare(&self, template: &Template, name: &str) -> Result<Machine> {
        let folder = self.paths.machine(name);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        Ok(Machine {
            name: name.to_owned(),
            key: MachineKey(self.next_key()),
            folder,
            config: template.config.clone(),
            nets: template.nets.clone(),
            source: template.source.clone(),
            releasing: Mutex::new(()),
            turn: Mutex::new(()),
            state: Mutex::new(State::Paused),
            lineage: Mutex::new(template.lineage.clone()),
            live: Mutex::new(None),
            last_faults: Mutex::new(None),
            identity: Identity::new(super::agent::generation()?),
        })
    }

    /// Starts the process, makes the machine in it, has its faults served and
    /// lets it run; returns when it entered the guest.
    fn start(
        &self,
        machine: &Arc<Machine>,
        template: &Template,
        paused: bool,
    ) -> Result<Option<u64>> {
        let log = File::create(machine.folder.join("vmm.log"))
            .with_context(|| format!("cannot write in {}", machine.folder.display()))?;
        let console = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(machine.folder.join("console.log"))?;
        let overlays = (0..template.config.disks.len())
            .map(|index| new_overlay(machine, index, template.config.disks[index].len))
            .collect::<Result<Vec<File>>>()?;
        let nets = template.nets.iter().map(Net::new).collect::<Result<Vec<Net>>>()?;
        let vmm = self.spawn_vmm(machine, &log)?;
        let built = build(&vmm, template, &console, (&overlays, &nets))?;
        let pools = attach(self, machine, template, &built)?;
        let live = Arc::new(Live { vmm, built, overlays, nets, _pools: pools });
        *lock(&machine.live) = Some(Arc::clone(&live));
        if paused {
            return Ok(None);
        }
        let entered_ns = live.vmm.resume()?;
        machine.now(State::Running);
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
    let log = std::fs::read_to_string(machine.folder.join("vmm.log")).unwrap_or_default();
    match log.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => format!("its process ended unexpectedly: {}", line.trim()),
        None => "its process ended unexpectedly".to_owned(),
    }
}

fn new_overlay(machine: &Machine, index: usize, len: u64) -> Result<File> {
    let path = machine.folder.join(format!("disk{index}.overlay"));
    let file = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(len.next_multiple_of(4096))?;
    Ok(file)
}

fn build(
    vmm: &Vmm,
    template: &Template,
    console: &File,
    (overlays, nets): (&[File], &[Net]),
) -> Result<Built> {
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![console.as_fd()];
    for (pool, overlay) in template.disks.iter().zip(overlays) {
        descriptors.push(pool.memory.as_fd());
        descriptors.push(overlay.as_fd());
    }
    descriptors.extend(nets.iter().map(|net| net.tap.file().as_fd()));
    let start = match &template.origin {
        Origin::Kernel { cmdline, kernel } => {
            descriptors.push(kernel.as_fd());
            Start::Boot { cmdline: cmdline.clone() }
        }
        Origin::Instant { state, memory } => {
            descriptors.push(memory.memory.as_fd());
            let pages = template.config.memory_bytes / PAGE_SIZE;
            let frozen = vec![Vec::new(); overlays.len()];
            Start::Restore { state: state.clone(), memory: Piece::whole(pages, 0), frozen }
        }
    };
    let nets = nets.iter().map(Net::config).collect();
    Ok(vmm.build(template.config.clone(), nets, start, &descriptors)?)
}

/// Has the page server answer the machine's faults; returns the pools in use.
fn attach(
    supervisor: &Supervisor,
    machine: &Machine,
    template: &Template,
    built: &Built,
) -> Result<Vec<Arc<Pool>>> {
    let memory = match &template.origin {
        Origin::Instant { memory, .. } => Some(memory),
        Origin::Kernel { .. } => None,
    };
    let pool_of = |content: Content| match content {
        Content::Memory => memory,
        Content::Disk(index) => template.disks.get(usize::try_from(index).ok()?),
    };
    let regions = built
        .regions
        .iter()
        .filter(|region| region.pooled)
        .map(|region| Some((pool_of(region.content)?.id, *region)))
        .collect::<Option<Vec<(PoolId, Region)>>>()
        .context("the machine has a mapping that no image fits")?;
    let pools: Vec<Arc<Pool>> = memory.into_iter().chain(&template.disks).cloned().collect();
    // The page server that made the pools: a later one does not know them.
    let pager = match pools.first() {
        Some(pool) => Arc::clone(&pool.pager),
        None => supervisor.pager()?,
    };
    pager.attach(machine.key, regions, &built.userfault)?;
    Ok(pools)
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
