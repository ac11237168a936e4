//! Making a machine.
//!
//! The order keeps faults answerable: the mappings, their registration, and
//! only then the memory slots. The eventfds come after them: they leave KVM
//! with grace periods that a memory slot would wait for (2.4 ms instead of
//! 0.1); those of the chips, which are made with the VM, are over by then if the
//! process waited a while for its machine. Nothing here reads pooled memory,
//! because the page server serves the machine only once it has the descriptors
//! that are handed over.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_ioctls::{VcpuFd, VmFd};

use super::boot::{self, BootError, VirtioWindow, full_cmdline};
use super::bus::Devices;
use super::kit::Kit;
use super::machine::{Machine, MachineError, OnEnd, Waiting};
use super::regions::Handover;
use super::state::MachineState;
use super::wiring;
use crate::devices::virtio::{Balloon, Block, Disk, Identity, Net, Rng, Transport, Vsock};
use crate::devices::{ConsoleLog, Gate, Serial};
use crate::memory::{Freed, Ram, RamLayout, set_memslots};
use crate::pieces::Piece;
use crate::protocol::{Content, MachineConfig, NetConfig, PAGE_SIZE, PageRun, Start};
use crate::sys::kvm::call;
use crate::vcpu::{Bus, CpuTable, HostKind, Vcpu, enter_long_mode, software_cmdline};

/// vsock and rng.
const DEVICES_OF_EACH: usize = 2;

/// A configuration that has been checked.
struct Plan {
    config: MachineConfig,
    nets: Vec<NetConfig>,
    vcpus: u8,
    layout: RamLayout,
    /// Machines of earlier versions have none.
    balloon: bool,
    begin: Begin,
}

enum Begin {
    Boot { cmdline: String },
    Continue(Box<Instant>),
}

/// What a machine continues from, besides its pools.
struct Instant {
    state: MachineState,
    memory: Vec<Piece<u32>>,
    frozen: Vec<Vec<Vec<PageRun>>>,
}

impl Plan {
    fn new(
        (config, nets): (MachineConfig, Vec<NetConfig>),
        start: Start,
    ) -> Result<Self, MachineError> {
        let vcpus = u8::try_from(config.vcpus).ok().filter(|count| (1..=32).contains(count));
        let vcpus = vcpus.ok_or(MachineError::Vcpus(config.vcpus))?;
        let device_count = config.disks.len() + DEVICES_OF_EACH + nets.len();
        if device_count > wiring::DEVICES_MAX {
            return Err(MachineError::Devices(device_count));
        }
        let layout = RamLayout::new(config.memory_bytes)?;
        let mut balloon = device_count < wiring::DEVICES_MAX;
        let begin = match start {
            Start::Boot { cmdline } => Begin::Boot { cmdline },
            Start::Restore { state, memory, frozen } => {
                let state = MachineState::decode(&state)?;
                balloon = state.virtio.len() == device_count + 1;
                state.check(&config, device_count + usize::from(balloon))?;
                if frozen.len() != config.disks.len() {
                    return Err(MachineError::Overlays(frozen.len(), config.disks.len()));
                }
                Begin::Continue(Box::new(Instant { state, memory, frozen }))
            }
        };
        Ok(Self { config, nets, vcpus, layout, balloon, begin })
    }

    fn saved(&self) -> Option<&MachineState> {
        match &self.begin {
            Begin::Boot { .. } => None,
            Begin::Continue(instant) => Some(&instant.state),
        }
    }

    /// The blocks of a disk's frozen overlays.
    fn frozen(&self, disk: usize) -> &[Vec<PageRun>] {
        match &self.begin {
            Begin::Boot { .. } => &[],
            Begin::Continue(instant) => &instant.frozen[disk],
        }
    }

    /// How many files its memory or its kernel comes from.
    fn images(&self) -> usize {
        match &self.begin {
            Begin::Boot { .. } => 1,
            Begin::Continue(instant) => {
                let pools = instant.memory.iter().map(|piece| piece.pool + 1).max();
                usize::try_from(pools.unwrap_or(0)).unwrap_or(usize::MAX)
            }
        }
    }
}

/// The descriptors that come with `Build`.
struct Parts {
    log: File,
    disks: Vec<DiskFiles>,
    /// Of each network device.
    links: Vec<OwnedFd>,
    /// The kernel, or the memory pools.
    images: Vec<File>,
}

/// Those of one disk.
struct DiskFiles {
    pool: File,
    overlay: File,
    frozen: Vec<File>,
}

impl Parts {
    fn of(plan: &Plan, descriptors: Vec<OwnedFd>) -> Result<Self, MachineError> {
        let disks = plan.config.disks.len();
        let frozen: usize = (0..disks).map(|disk| plan.frozen(disk).len()).sum();
        let others = 1 + 2 * disks + frozen + plan.nets.len();
        let needed = others.saturating_add(plan.images());
        if descriptors.len() != needed {
            return Err(MachineError::Descriptors(descriptors.len(), needed));
        }
        let mut files = descriptors.into_iter().map(File::from);
        let mut next = || files.next().expect("the number was checked");
        let log = next();
        let disks = (0..disks)
            .map(|disk| DiskFiles {
                pool: next(),
                overlay: next(),
                frozen: plan.frozen(disk).iter().map(|_| next()).collect(),
            })
            .collect();
        let links = plan.nets.iter().map(|_| next().into()).collect();
        Ok(Self { log, disks, links, images: files.collect() })
    }
}

/// Makes the machine, stopped before its first instruction.
pub(super) fn build(
    what: (MachineConfig, Vec<NetConfig>),
    start: Start,
    descriptors: Vec<OwnedFd>,
    kit: Kit,
    on_end: &OnEnd,
) -> Result<Machine, MachineError> {
    let plan = Plan::new(what, start)?;
    let Parts { log, disks: disk_files, links, mut images } = Parts::of(&plan, descriptors)?;
    let Kit { kvm, vm, first_vcpu, mut handover, host_cpus } = kit;
    if let Some(saved) = plan.saved() {
        let host_cpus = host_cpus.map_or_else(|| CpuTable::supported(&kvm), Ok)?;
        saved.cpus.check_against(&host_cpus)?;
    }
    let ram = Arc::new(match &plan.begin {
        Begin::Boot { .. } => Ram::anonymous(plan.layout)?,
        Begin::Continue(instant) => memory_of(&instant.memory, &images, plan.layout)?,
    });
    let disks = open_disks(&plan, disk_files)?;
    register(&mut handover, &ram, &disks, &plan)?;
    set_memslots(&vm, &ram)?;

    let gate = Arc::new(Gate::closed());
    let serial = Serial::new(ConsoleLog::new(log), plan.saved().map(|saved| &saved.serial))?;
    wiring::connect_serial(&vm, &serial)?;
    let virtio = make_transports(&plan, &ram, &gate)?;
    let windows = connect(&vm, &virtio)?;
    let devices = Arc::new(Devices { serial: Arc::new(serial), virtio });

    let (cpus, fds) = match &plan.begin {
        Begin::Boot { cmdline } => {
            let host = HostKind::probe(&kvm)?;
            let cpus = CpuTable::of_host(&kvm, host)?;
            let fds = make_vcpus(&vm, first_vcpu, &cpus, plan.vcpus)?;
            let line = command_line(cmdline, &windows, host)?;
            let entry = boot::load_linux(&ram, &mut images[0], &line, plan.vcpus)?;
            enter_long_mode(&fds[0], ram.guest(), entry, boot::ZERO_PAGE)?;
            (cpus, fds)
        }
        Begin::Continue(instant) => {
            let cpus = &instant.state.cpus;
            (cpus.clone(), make_vcpus(&vm, first_vcpu, cpus, plan.vcpus)?)
        }
    };
    let freed = Arc::new(Freed::new(Arc::clone(&ram), handover.pagemap()?));
    let vsock = start_devices(&devices.virtio, &disks, (links, &freed), plan.saved())?;
    let vcpus = start_vcpus(fds, &devices, on_end)?;
    let waiting = match plan.begin {
        Begin::Boot { .. } => None,
        Begin::Continue(instant) => {
            let MachineState { vcpus, chips, .. } = instant.state;
            Some(Waiting { vcpus, chips })
        }
    };
    let config = plan.config;
    Ok(Machine {
        config,
        kvm,
        vm,
        ram,
        cpus,
        vcpus,
        waiting,
        gate,
        devices,
        disks,
        vsock,
        freed,
        handover,
        running: false,
    })
}

fn memory_of(
    memory: &[Piece<u32>],
    pools: &[File],
    layout: RamLayout,
) -> Result<Ram, MachineError> {
    let file = |piece: &Piece<u32>| pools.get(usize::try_from(piece.pool).ok()?);
    let pieces: Option<Vec<(PageRun, &File)>> =
        memory.iter().map(|piece| Some((piece.run, file(piece)?))).collect();
    let pieces = pieces.ok_or(MachineError::Descriptors(pools.len(), memory.len()))?;
    Ok(Ram::of_pieces(&pieces, layout)?)
}

fn open_disks(plan: &Plan, files: Vec<DiskFiles>) -> Result<Vec<Arc<Disk>>, MachineError> {
    let mut disks = Vec::new();
    for (index, (disk, files)) in plan.config.disks.iter().zip(files).enumerate() {
        let DiskFiles { pool, overlay, frozen } = files;
        let frozen = frozen.into_iter().zip(plan.frozen(index)).collect();
        disks.push(Arc::new(Disk::new(disk.len, disk.read_only, &pool, overlay, frozen)?));
    }
    Ok(disks)
}

fn register(
    handover: &mut Handover,
    ram: &Ram,
    disks: &[Arc<Disk>],
    plan: &Plan,
) -> Result<(), MachineError> {
    match &plan.begin {
        Begin::Boot { .. } => handover.add_own(Content::Memory, ram.mapping()),
        Begin::Continue(instant) => {
            let pieces: Vec<PageRun> = instant.memory.iter().map(|piece| piece.run).collect();
            handover.add_pooled(Content::Memory, ram.mapping(), &pieces)?;
        }
    }
    for (index, disk) in (0..).zip(disks) {
        let count = (disk.pool().len() as u64).div_ceil(PAGE_SIZE);
        let whole = [PageRun { first: 0, count }];
        handover.add_pooled(Content::Disk(index), disk.pool(), &whole)?;
    }
    Ok(())
}

/// The disks, vsock, rng, then the network devices, then the balloon; with their
/// saved states if there are some.
fn make_transports(
    plan: &Plan,
    ram: &Arc<Ram>,
    gate: &Arc<Gate>,
) -> Result<Vec<Arc<Transport>>, MachineError> {
    let mut identities: Vec<Identity> = Vec::new();
    for disk in &plan.config.disks {
        identities.push(Block::identity(disk.len, disk.read_only)?);
    }
    identities.extend([Vsock::identity(), Rng::identity()]);
    identities.extend(plan.nets.iter().map(|net| Net::identity(net.mac)));
    identities.extend(plan.balloon.then(Balloon::identity));
    let mut transports = Vec::new();
    for identity in identities {
        let transport = Transport::new(identity, Arc::clone(ram), Arc::clone(gate));
        transports.push(Arc::new(transport.map_err(MachineError::Device)?));
    }
    if let Some(saved) = plan.saved() {
        for (transport, state) in transports.iter().zip(&saved.virtio) {
            transport.restore(state)?;
        }
    }
    Ok(transports)
}

fn connect(vm: &VmFd, virtio: &[Arc<Transport>]) -> Result<Vec<VirtioWindow>, MachineError> {
    let mut windows = Vec::new();
    for (index, transport) in virtio.iter().enumerate() {
        let window = wiring::window(index).ok_or(MachineError::Devices(virtio.len()))?;
        wiring::connect(vm, transport, window)?;
        windows.push(window);
    }
    Ok(windows)
}

fn command_line(user: &str, windows: &[VirtioWindow], host: HostKind) -> Result<String, BootError> {
    let extra = match host {
        HostKind::Hardware => "",
        HostKind::Software => software_cmdline(),
    };
    Ok(full_cmdline(user, windows, extra)?)
}

fn make_vcpus(
    vm: &VmFd,
    first: VcpuFd,
    cpus: &CpuTable,
    count: u8,
) -> Result<Vec<VcpuFd>, MachineError> {
    let mut fds = vec![first];
    for id in 1..count {
        fds.push(vm.create_vcpu(u64::from(id)).map_err(call("KVM_CREATE_VCPU"))?);
    }
    for (id, fd) in (0..).zip(&fds) {
        cpus.install(fd, id, count)?;
    }
    Ok(fds)
}

fn start_devices(
    virtio: &[Arc<Transport>],
    disks: &[Arc<Disk>],
    (links, freed): (Vec<OwnedFd>, &Arc<Freed>),
    saved: Option<&MachineState>,
) -> Result<Vsock, MachineError> {
    let (blocks, others) = virtio.split_at(disks.len());
    for (index, (transport, disk)) in blocks.iter().zip(disks).enumerate() {
        Block::start(&format!("disk{index}"), Arc::clone(transport), Arc::clone(disk))?;
    }
    let [vsock, rng, nets @ ..] = others else {
        return Err(MachineError::Devices(virtio.len()));
    };
    Rng::start(Arc::clone(rng))?;
    if let Some(balloon) = nets.get(links.len()) {
        Balloon::start(Arc::clone(balloon), Arc::clone(freed))?;
    }
    for (index, (transport, link)) in nets.iter().zip(links).enumerate() {
        Net::start(&format!("net{index}"), Arc::clone(transport), link)?;
    }
    Ok(Vsock::start(Arc::clone(vsock), saved.map(|saved| &saved.vsock))?)
}

fn start_vcpus(
    fds: Vec<VcpuFd>,
    devices: &Arc<Devices>,
    on_end: &OnEnd,
) -> Result<Vec<Arc<Vcpu>>, MachineError> {
    let mut vcpus = Vec::new();
    for (id, fd) in (0..).zip(fds) {
        let vcpu = Vcpu::new(fd);
        let bus: Arc<dyn Bus> = Arc::clone(devices) as Arc<dyn Bus>;
        let on_end = Arc::clone(on_end);
        vcpu.spawn(id, bus, Box::new(move |end| on_end(end)))?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}
