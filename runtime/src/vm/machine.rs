//! One machine, from its first resume to its end.
//!
//! A restored vCPU gets its state at the first `resume`, when the page server
//! serves the machine: KVM looks up the guest's clock page as soon as it is
//! told of it. Until then the machine is exactly what was saved.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, VolatileMemoryError};

use super::boot::BootError;
use super::bus::Devices;
use super::chips::{self, ChipState};
use super::regions::{Handover, RegionError};
use super::state::{MachineState, StateError};
use super::wiring;
use crate::devices::virtio::{BlockError, Disk, DiskError, TransportError, Vsock, WorkerError};
use crate::devices::{Gate, SerialError};
use crate::memory::{Freed, LayoutError, Ram, RamError};
use crate::protocol::{MachineConfig, PageRun};
use crate::sys::kvm::{KvmError, call};
use crate::vcpu::{
    CpuTable, CpuidError, End, LongModeError, ProbeError, Vcpu, VcpuError, VcpuState,
    VcpuStateError, listed_msrs, restore_vcpu, save_vcpu,
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
    #[error("{0} devices: at most {max} fit, vsock and rng included", max = wiring::DEVICES_MAX)]
    Devices(usize),
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
    #[error("cannot read guest memory: {0}")]
    Populate(VolatileMemoryError),
    #[error("overlays of {0} disks for a machine that has {1}")]
    Overlays(usize, usize),
    #[error("the machine has no disk {0}")]
    NoDisk(usize),
    #[error("the machine must be paused first")]
    NotPaused,
}

/// What becomes of a machine that ends by itself.
pub(super) type OnEnd = Arc<dyn Fn(End) + Send + Sync>;

/// Bytes of a page.
const PAGE_LEN: usize = 4096;

/// What KVM is told before a restored machine first runs.
pub(super) struct Waiting {
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) chips: ChipState,
}

/// A machine.
pub(super) struct Machine {
    pub(super) config: MachineConfig,
    pub(super) kvm: Kvm,
    pub(super) vm: VmFd,
    // Behind the memory slots for as long as `vm` and the vCPUs can run.
    pub(super) ram: Arc<Ram>,
    pub(super) cpus: CpuTable,
    pub(super) vcpus: Vec<Arc<Vcpu>>,
    /// `None` once it has run.
    pub(super) waiting: Option<Waiting>,
    pub(super) gate: Arc<Gate>,
    pub(super) devices: Arc<Devices>,
    pub(super) disks: Vec<Arc<Disk>>,
    pub(super) vsock: Vsock,
    pub(super) freed: Arc<Freed>,
    pub(super) handover: Handover,
    pub(super) running: bool,
}

impl Machine {
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
        let Some(waiting) = &self.waiting else { return Ok(()) };
        chips::restore(&self.vm, &waiting.chips)?;
        for (vcpu, state) in self.vcpus.iter().zip(&waiting.vcpus) {
            let refused = restore_vcpu(&self.vm, &vcpu.fd(), state)?;
            for index in refused {
                tracing::warn!("this host's KVM refuses to set MSR {index:#x}");
            }
        }
        self.devices.serial.send_interrupt_again();
        for device in &self.devices.virtio {
            device.send_interrupt_again();
        }
        self.waiting = None;
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
        let Waiting { vcpus, chips } = self.save_kvm()?;
        let state = MachineState {
            config: self.config.clone(),
            cpus: self.cpus.clone(),
            vcpus,
            chips,
            serial: self.devices.serial.save(),
            virtio: self.devices.virtio.iter().map(|device| device.save()).collect(),
            vsock: self.vsock.save(),
        };
        let overlays = self.disks.iter().map(|disk| disk.overlay_runs()).collect();
        Ok((state.encode()?, overlays))
    }

    /// Describes the paused machine, and puts a new overlay on each disk in
    /// whose overlay it has written.
    pub(super) fn freeze(
        &self,
        overlays: Vec<File>,
    ) -> Result<(Vec<u8>, Vec<Vec<PageRun>>), MachineError> {
        if overlays.len() != self.disks.len() {
            return Err(MachineError::Descriptors(overlays.len(), self.disks.len()));
        }
        let (state, runs) = self.save()?;
        for (disk, overlay) in self.disks.iter().zip(overlays) {
            disk.freeze(overlay);
        }
        Ok((state, runs))
    }

    /// The pages that the guest has ever freed.
    pub(super) fn freed(&self) -> Vec<PageRun> {
        self.freed.runs()
    }

    /// Replaces frozen overlays of a disk by one that holds the same.
    pub(super) fn fold(
        &self,
        disk: u32,
        count: u32,
        overlay: File,
        runs: &[PageRun],
    ) -> Result<(), MachineError> {
        let index = usize::try_from(disk).unwrap_or(usize::MAX);
        let disk = self.disks.get(index).ok_or(MachineError::NoDisk(index))?;
        Ok(disk.fold(usize::try_from(count).unwrap_or(usize::MAX), overlay, runs)?)
    }

    /// Reads a byte of every page; each that is missing comes from the page
    /// server.
    pub(super) fn populate(&self) -> Result<(), MachineError> {
        let bytes = self.ram.mapping().bytes();
        for start in (0..bytes.len()).step_by(PAGE_LEN) {
            bytes.read_obj::<u8>(start).map_err(MachineError::Populate)?;
        }
        Ok(())
    }

    fn save_kvm(&self) -> Result<Waiting, MachineError> {
        if let Some(Waiting { vcpus, chips }) = &self.waiting {
            return Ok(Waiting { vcpus: vcpus.clone(), chips: chips.clone() });
        }
        let msrs = listed_msrs(&self.kvm)?;
        let save = |vcpu: &Arc<Vcpu>| save_vcpu(&self.vm, &vcpu.fd(), &msrs);
        let vcpus = self.vcpus.iter().map(save).collect::<Result<_, _>>()?;
        Ok(Waiting { vcpus, chips: chips::save(&self.vm)? })
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
