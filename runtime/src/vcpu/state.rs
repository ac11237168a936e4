//! All of one vCPU's state.
//!
//! Order matters on both sides. Saving reads the multiprocessing state first,
//! because that settles a pending INIT or SIPI. Restoring writes the CPUID
//! table first, since it decides what may be written afterwards, the TSC before
//! the LAPIC, and the TSC deadline last, since setting the LAPIC clears it.

use kvm_bindings::{
    Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::msr;
use crate::sys::kvm::{KvmError, call};

/// Everything that KVM keeps for one vCPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// The XSAVE area in 32-bit words; longer than 1,024 of them if the CPU
    /// has more state.
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
    tsc_khz: u32,
}

/// Why a vCPU's state could not be taken or given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VcpuStateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host's area differs from the saved one.
    #[error("the XSAVE area has {saved} bytes, this host's {host}")]
    XsaveSize {
        /// Saved length in bytes.
        saved: usize,
        /// This host's length in bytes.
        host: usize,
    },
}

const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / 4;

/// Reads all state of a vCPU that does not run.
pub(crate) fn save_vcpu(
    vm: &VmFd,
    vcpu: &VcpuFd,
    msr_list: &[u32],
) -> Result<VcpuState, VcpuStateError> {
    Ok(VcpuState {
        mp_state: vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?,
        regs: vcpu.get_regs().map_err(call("KVM_GET_REGS"))?,
        sregs: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
        xsave: xsave::get(vm, vcpu)?,
        xcrs: vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
        debugregs: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
        lapic: vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?,
        msrs: msr::read(vcpu, msr_list)?,
        events: vcpu.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
    })
}

/// Gives a new vCPU, whose CPUID table is set, a saved state. Returns the MSRs
/// that this host refused.
pub(crate) fn restore_vcpu(
    vm: &VmFd,
    vcpu: &VcpuFd,
    state: &VcpuState,
) -> Result<Vec<u32>, VcpuStateError> {
    set_tsc_rate(vm, vcpu, state.tsc_khz)?;
    vcpu.set_mp_state(state.mp_state).map_err(call("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&state.regs).map_err(call("KVM_SET_REGS"))?;
    vcpu.set_sregs(&state.sregs).map_err(call("KVM_SET_SREGS"))?;
    xsave::set(vm, vcpu, &state.xsave)?;
    vcpu.set_xcrs(&state.xcrs).map_err(call("KVM_SET_XCRS"))?;
    vcpu.set_debug_regs(&state.debugregs).map_err(call("KVM_SET_DEBUGREGS"))?;
    let mut refused = msr::write(vcpu, &msr::in_write_order(&state.msrs))?;
    vcpu.set_lapic(&state.lapic).map_err(call("KVM_SET_LAPIC"))?;
    let deadline: Vec<_> =
        state.msrs.iter().filter(|entry| entry.index == msr::TSC_DEADLINE).copied().collect();
    refused.extend(msr::write(vcpu, &deadline)?);
    vcpu.set_vcpu_events(&state.events).map_err(call("KVM_SET_VCPU_EVENTS"))?;
    Ok(refused)
}

/// Scales the guest's TSC if the host's runs at another rate and can.
fn set_tsc_rate(vm: &VmFd, vcpu: &VcpuFd, tsc_khz: u32) -> Result<(), KvmError> {
    let host = vcpu.get_tsc_khz().unwrap_or(0);
    if tsc_khz != 0 && tsc_khz != host && vm.check_extension(Cap::TscControl) {
        vcpu.set_tsc_khz(tsc_khz).map_err(call("KVM_SET_TSC_KHZ"))?;
    }
    Ok(())
}

mod xsave {
    //! The XSAVE area, whose length depends on the host.
    #![expect(unsafe_code, reason = "the kernel reads and writes past the fixed structure")]

    use super::{Cap, KvmError, VcpuFd, VcpuStateError, VmFd, XSAVE_WORDS, Xsave, call};

    /// Words behind the fixed structure on this host.
    fn extra_words(vm: &VmFd) -> usize {
        let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        bytes.div_ceil(4).saturating_sub(XSAVE_WORDS)
    }

    pub(super) fn get(vm: &VmFd, vcpu: &VcpuFd) -> Result<Vec<u32>, KvmError> {
        let extra = extra_words(vm);
        if extra == 0 {
            let area = vcpu.get_xsave().map_err(call("KVM_GET_XSAVE"))?;
            return Ok(area.region.to_vec());
        }
        let mut area = Xsave::new(extra).expect("the kernel's area is small");
        // SAFETY: the area is as long as KVM_CAP_XSAVE2 says.
        let got = unsafe { vcpu.get_xsave2(&mut area) };
        got.map_err(call("KVM_GET_XSAVE2"))?;
        let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
        words.extend_from_slice(area.as_slice());
        Ok(words)
    }

    pub(super) fn set(vm: &VmFd, vcpu: &VcpuFd, words: &[u32]) -> Result<(), VcpuStateError> {
        let extra = extra_words(vm);
        let host = XSAVE_WORDS + extra;
        if words.len() < XSAVE_WORDS || words.len() > host {
            return Err(VcpuStateError::XsaveSize { saved: words.len() * 4, host: host * 4 });
        }
        let mut area = Xsave::new(extra).expect("the kernel's area is small");
        // SAFETY: the fixed part is assigned; the length field stays as made.
        let fixed = unsafe { &mut area.as_mut_fam_struct().xsave };
        fixed.region.copy_from_slice(&words[..XSAVE_WORDS]);
        let behind = &words[XSAVE_WORDS..];
        area.as_mut_slice()[..behind.len()].copy_from_slice(behind);
        // SAFETY: the area is as long as this host's KVM reads.
        let set = unsafe { vcpu.set_xsave2(&area) };
        set.map_err(call("KVM_SET_XSAVE"))?;
        Ok(())
    }
}
