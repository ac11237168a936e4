//! One machine, from its parts to its end.
//!
//! Built in the order that keeps faults answerable: the VM, the mappings, their
//! registration, and only then the memory slots. The chips and eventfds come
//! after them: they leave KVM with grace periods that a memory slot would wait
//! for (2.4 ms of 0.1). Nothing reads pooled memory before the first `resume`,
//! because the page server serves the machine only once it has the descriptors
//! that `build` makes; that is why a restored vCPU gets its state then (KVM
//! looks up the guest's clock page when it is told of it).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::boot::{self, BootError, full_cmdline};
use super::bus::Devices;
use super::chips;
use super::regions::{Handover, RegionError};
use super::state::{MachineState, StateError};
use super::wiring;
use crate::devices::virtio::{
    Block, BlockError, Disk, DiskError, Identity, Rng, Transport, TransportError, Vsock,
    WorkerError,
};
use crate::devices::{ConsoleLog, Gate, Serial, SerialError};
use crate::memory::{LayoutError, Ram, RamError, RamLayout, set_memslots};
use crate::protocol::{Content, MachineConfig, PageRun, Start};
use crate::sys::kvm::{KvmError, call};
use crate::vcpu::{
    Bus, CpuTable, CpuidError, End, HostKind, LongModeError, ProbeError, Vcpu, VcpuError,
    VcpuState, VcpuStateError, enter_long_mode, listed_msrs, restore_vcpu, save_vcpu,
    software_cmdline,
};

/// Why a machine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum MachineError {
    #[error("cannot open /dev/kvm: {0}; this host needs KVM and the right to use it")]
    NoKvm(io::Error),
    #[error("{0} descriptors arrived, this machine needs {1}")]
    Descriptors(usize, usize),
    #[error("{0} vCPUs: a machine has 1 to 32")]
    Vcpus(u32),
    #[error("{0} disks: at most {max} fit", max = wiring::DEVICES_MAX - 2)]
    Disks(usize),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Block(#[from] BlockError),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    LongMode(#[from] LongModeError),
    #[error(transparent)]
    Probe(#[from] ProbeError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("machine state: {0}")]
    Encode(#[from] postcard::Error),
    #[error("machine state: {0}")]
    Cpuid(#[from] CpuidError),
    #[error("machine state: vCPU: {0}")]
    VcpuState(#[from] VcpuStateError),
    #[error("machine state: {0}")]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Serial(#[from] SerialError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Worker(#[from] WorkerError),
    #[error("device: {0}")]
    Device(io::Error),
    #[error("the machine did not stop within {0} ms; it runs on")]
    Deadline(u64),
    #[error("the machine must be paused first")]
    NotPaused,
}

/// The descriptors that come with `Build`.
struct Parts {
    log: File,
    disks: Vec<(File, File)>,
    image: File,
}

impl Parts {
    fn of(config: &MachineConfig, descriptors: Vec<OwnedFd>) -> Result<Self, MachineError> {
        let needed = 2 + 2 * config.disks.len();
        if descriptors.len() != needed {
            return Err(MachineError::Descriptors(descriptors.len(), needed));
        }
        let mut files = descriptors.into_iter().map(File::from);
        let mut next = || files.next().expect("the number was checked");
        let log = next();
        let disks = config.disks.iter().map(|_| (next(), next())).collect();
        Ok(Self { log, disks, image: next() })
    }
}

/// What becomes of a machine that ends by itself.
pub(super) type OnEnd = Arc<dyn Fn(End) + Send + Sync>;

/// A machine.
pub(super) struct Machine {
    config: MachineConfig,
    kvm: Kvm,
    vm: VmFd,
    // Behind the memory slots for as long as `vm` and the vCPUs can run.
    _ram: Arc<Ram>,
    cpus: CpuTable,
    vcpus: Vec<Arc<Vcpu>>,
    /// The states that restored vCPUs get before they first run.
    waiting: Vec<VcpuState>,
    gate: Arc<Gate>,
    devices: Arc<Devices>,
    disks: Vec<Arc<Disk>>,
    vsock: Vsock,
    handover: Handover,
    running: bool,
}

impl Machine {
    /// Makes the machine, stopped before its first instruction.
    pub(super) fn build(
        config: MachineConfig,
        start: Start,
        descriptors: Vec<OwnedFd>,
        on_end: &OnEnd,
    ) -> Result<Self, MachineError> {
        let vcpus = u8::try_from(config.vcpus).ok().filter(|count| (1..=32).contains(count));
        let vcpus = vcpus.ok_or(MachineError::Vcpus(config.vcpus))?;
        let device_count = config.disks.len() + 2;
        if device_count > wiring::DEVICES_MAX {
            return Err(MachineError::Disks(config.disks.len()));
        }
        let layout = RamLayout::new(config.memory_bytes)?;
        let parts = Parts::of(&config, descriptors)?;
        let saved = match &start {
            Start::Boot { .. } => None,
            Start::Restore { state } => Some(MachineState::decode(state)?),
        };

        let kvm = Kvm::new().map_err(|error| MachineError::NoKvm(error.into()))?;
        if let Some(saved) = &saved {
            saved.check(&config, device_count)?;
            saved.cpus.check_host(&kvm)?;
        }
        let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        let ram = Arc::new(match &start {
            Start::Boot { .. } => Ram::anonymous(layout)?,
            Start::Restore { .. } => Ram::of_pool(&parts.image, layout)?,
        });
        let disks = open_disks(&config, parts.disks)?;
        let handover = register(&ram, &disks, saved.is_some())?;

        set_memslots(&vm, &ram)?;
        chips::make(&vm)?;

        let gate = Arc::new(Gate::closed());
        let serial = Serial::new(ConsoleLog::new(parts.log), saved.as_ref().map(|s| &s.serial))?;
        let serial = Arc::new(serial);
        wiring::connect_serial(&vm, &serial)?;
        let virtio = make_transports(&config, &ram, &gate)?;
        if let Some(saved) = &saved {
            for (transport, state) in virtio.iter().zip(&saved.virtio) {
                transport.restore(state)?;
            }
        }
        let mut windows = Vec::new();
        for (index, transport) in virtio.iter().enumerate() {
            let window = wiring::window(index).ok_or(MachineError::Disks(disks.len()))?;
            wiring::connect(&vm, transport, window)?;
            windows.push(window);
        }

        let (cpus, entry) = match start {
            Start::Boot { cmdline } => {
                let host = HostKind::probe(&kvm)?;
                let extra = if host == HostKind::Software { software_cmdline() } else { "" };
                let line = full_cmdline(&cmdline, &windows, extra).map_err(BootError::from)?;
                let mut kernel = parts.image;
                let entry = boot::load_linux(&ram, &mut kernel, &line, vcpus)?;
                (CpuTable::of_host(&kvm, host)?, Some(entry))
            }
            Start::Restore { .. } => {
                let saved = saved.as_ref().ok_or(MachineError::NotPaused)?;
                (saved.cpus.clone(), None)
            }
        };
        let devices = Arc::new(Devices { serial, virtio });
        let mut fds = Vec::new();
        for id in 0..vcpus {
            let fd = vm.create_vcpu(u64::from(id)).map_err(call("KVM_CREATE_VCPU"))?;
            cpus.install(&fd, id, vcpus)?;
            fds.push(fd);
        }
        if let Some(entry) = entry {
            enter_long_mode(&fds[0], ram.guest(), entry, boot::ZERO_PAGE)?;
        }
        if let Some(saved) = &saved {
            chips::restore(&vm, &saved.chips)?;
        }

        let vsock = start_devices(&devices.virtio, &disks, saved.as_ref())?;
        let vcpus = start_vcpus(fds, &devices, on_end)?;
        let waiting = saved.map(|saved| saved.vcpus).unwrap_or_default();
        Ok(Self {
            config,
            kvm,
            vm,
            _ram: ram,
            cpus,
            vcpus,
            waiting,
            gate,
            devices,
            disks,
            vsock,
            handover,
            running: false,
        })
    }

    /// What the supervisor needs for faults and captures.
    pub(super) fn handover(&self) -> &Handover {
        &self.handover
    }

    /// Lets the vCPUs run, and returns when the first entered the guest.
    pub(super) fn resume(&mut self) -> Result<u64, MachineError> {
        self.give_waiting_states()?;
        self.let_run();
        Ok(self.vcpus.iter().map(|vcpu| vcpu.entered_ns()).min().unwrap_or(0))
    }

    fn give_waiting_states(&mut self) -> Result<(), MachineError> {
        for (vcpu, state) in self.vcpus.iter().zip(std::mem::take(&mut self.waiting)) {
            let refused = restore_vcpu(&self.vm, &vcpu.fd(), &state)?;
            for index in refused {
                tracing::warn!("this host's KVM refuses to set MSR {index:#x}");
            }
        }
        Ok(())
    }

    fn let_run(&mut self) {
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
        self.gate.open();
        self.running = true;
    }

    /// Stops vCPUs and devices, or lets them run on if that takes too long.
    pub(super) fn pause(&mut self, deadline_ms: u64) -> Result<(), MachineError> {
        if !self.running {
            return Ok(());
        }
        let deadline = Instant::now() + Duration::from_millis(deadline_ms);
        for vcpu in &self.vcpus {
            vcpu.request_pause();
        }
        let stopped =
            self.vcpus.iter().all(|vcpu| vcpu.wait_parked(deadline)) && self.gate.close(deadline);
        if !stopped {
            self.let_run();
            return Err(MachineError::Deadline(deadline_ms));
        }
        self.running = false;
        for vcpu in &self.vcpus {
            tell_of_pause(&vcpu.fd())?;
        }
        Ok(())
    }

    /// Describes the paused machine: its state, and what each overlay holds.
    pub(super) fn save(&self) -> Result<(Vec<u8>, Vec<Vec<PageRun>>), MachineError> {
        if self.running {
            return Err(MachineError::NotPaused);
        }
        let state = MachineState {
            config: self.config.clone(),
            cpus: self.cpus.clone(),
            vcpus: self.save_vcpus()?,
            chips: chips::save(&self.vm)?,
            serial: self.devices.serial.save(),
            virtio: self.devices.virtio.iter().map(|device| device.save()).collect(),
            vsock: self.vsock.save(),
        };
        let overlays = self.disks.iter().map(|disk| disk.overlay_runs()).collect();
        Ok((state.encode()?, overlays))
    }

    fn save_vcpus(&self) -> Result<Vec<VcpuState>, MachineError> {
        if !self.waiting.is_empty() {
            // Never run since it was restored.
            return Ok(self.waiting.clone());
        }
        let msrs = listed_msrs(&self.kvm)?;
        let save = |vcpu: &Arc<Vcpu>| save_vcpu(&self.vm, &vcpu.fd(), &msrs);
        Ok(self.vcpus.iter().map(save).collect::<Result<_, _>>()?)
    }

    /// Serves a stream to a guest port.
    pub(super) fn connect(&self, stream: UnixStream, port: u32) -> Result<(), MachineError> {
        self.vsock.connect(stream, port).map_err(MachineError::Device)
    }
}

/// Tells the guest that it did not run for a while, so that its watchdogs do
/// not bark. A guest without kvm-clock cannot be told.
fn tell_of_pause(vcpu: &VcpuFd) -> Result<(), KvmError> {
    match vcpu.kvmclock_ctrl() {
        Err(error) if error.errno() != libc::EINVAL => Err(call("KVM_KVMCLOCK_CTRL")(error)),
        _ => Ok(()),
    }
}

fn open_disks(
    config: &MachineConfig,
    files: Vec<(File, File)>,
) -> Result<Vec<Arc<Disk>>, MachineError> {
    let mut disks = Vec::new();
    for (disk, (pool, overlay)) in config.disks.iter().zip(files) {
        disks.push(Arc::new(Disk::new(disk.len, disk.read_only, &pool, overlay)?));
    }
    Ok(disks)
}

fn register(ram: &Ram, disks: &[Arc<Disk>], pooled: bool) -> Result<Handover, MachineError> {
    let mut handover = Handover::new()?;
    handover.add(Content::Memory, ram.mapping(), pooled)?;
    for (index, disk) in (0..).zip(disks) {
        handover.add(Content::Disk(index), disk.pool(), true)?;
    }
    Ok(handover)
}

/// The disks, then vsock, then rng.
fn make_transports(
    config: &MachineConfig,
    ram: &Arc<Ram>,
    gate: &Arc<Gate>,
) -> Result<Vec<Arc<Transport>>, MachineError> {
    let mut identities: Vec<Identity> = Vec::new();
    for disk in &config.disks {
        identities.push(Block::identity(disk.len, disk.read_only)?);
    }
    identities.extend([Vsock::identity(), Rng::identity()]);
    let make = |identity| Transport::new(identity, Arc::clone(ram), Arc::clone(gate)).map(Arc::new);
    identities.into_iter().map(make).collect::<Result<_, _>>().map_err(MachineError::Device)
}

fn start_devices(
    virtio: &[Arc<Transport>],
    disks: &[Arc<Disk>],
    saved: Option<&MachineState>,
) -> Result<Vsock, MachineError> {
    let (blocks, others) = virtio.split_at(disks.len());
    for (index, (transport, disk)) in blocks.iter().zip(disks).enumerate() {
        Block::start(&format!("disk{index}"), Arc::clone(transport), Arc::clone(disk))?;
    }
    let [vsock, rng] = others else { return Err(MachineError::Disks(disks.len())) };
    Rng::start(Arc::clone(rng))?;
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
