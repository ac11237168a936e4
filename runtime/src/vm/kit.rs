//! What every machine needs and no configuration changes, made before it is
//! known which machine it will be: a fork then pays for neither.

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::chips;
use super::machine::MachineError;
use super::regions::Handover;
use super::sources::Sources;
use crate::sys::kvm::call;
use crate::vcpu::CpuTable;

/// The parts.
#[derive(Debug)]
pub(super) struct Kit {
    pub(super) kvm: Kvm,
    /// With its chips.
    pub(super) vm: VmFd,
    /// The vCPU that every machine has.
    pub(super) first_vcpu: VcpuFd,
    pub(super) handover: Handover,
    /// What KVM offers, if that is known already.
    pub(super) host_cpus: Option<CpuTable>,
}

impl Kit {
    /// Makes them.
    pub(super) fn new(sources: &Sources) -> Result<Self, MachineError> {
        let kvm = sources.kvm().map_err(MachineError::NoKvm)?;
        let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        chips::make(&vm)?;
        let first_vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
        let handover = Handover::new(sources)?;
        Ok(Self { kvm, vm, first_vcpu, handover, host_cpus: sources.cpus().cloned() })
    }
}
