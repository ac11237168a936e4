//! What kind of KVM this host has.
//!
//! Hardware KVM runs every instruction of the guest on the CPU. A software KVM
//! (`kvm_pvm`, on hosts that are virtual machines without nesting) runs the
//! guest's ring 3 on the CPU and emulates its ring 0 with KVM's instruction
//! emulator, which lacks instructions. What was found there, and what follows:
//!
//! - POPCNT, CMPXCHG16B, MONITOR, RDTSCP and all XSAVE instructions end in an
//!   internal error, so the CPUID table leaves them out where the guest kernel
//!   looks them up, and the command line turns off the POPCNT alternative,
//!   which the emulator ORs into leaf 1 by itself. Leaves 7 and 0xd are
//!   overridden by the host's if they are there, so the table ends at leaf 6.
//! - Hypercalls hang the vCPU: the four KVM features that use them are off.
//! - The guest kernel saves FXSAVE state only, but programs see the host's
//!   CPUID and would find AVX, whose registers are then lost on a switch:
//!   init's environment tells glibc and OpenSSL not to use it. The kernel puts
//!   parameters that it does not know into that environment.
//! - Calibrating the TSC and patching read-only text cost seconds: both off.
//!
//! The probe asks the behaviour, not a name: a guest of one instruction runs
//! POPCNT in ring 0. Hardware executes it whatever CPUID says.

use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::longmode::{LongModeError, enter_long_mode};
use crate::memory::{LayoutError, Ram, RamError, RamLayout, set_memslots};
use crate::sys::kvm::{KvmError, call};

/// Whether the guest's kernel runs on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostKind {
    /// All of the guest runs on the CPU.
    Hardware,
    /// Ring 0 is emulated, incompletely.
    Software,
}

/// Why the host could not be probed.
#[derive(Debug, thiserror::Error)]
#[error("probing the host: {0}")]
pub(crate) enum ProbeError {
    Layout(#[from] LayoutError),
    Ram(#[from] RamError),
    Memory(#[from] GuestMemoryError),
    LongMode(#[from] LongModeError),
    Kvm(#[from] KvmError),
    #[error("probing the host: the probe guest left with {0}")]
    Exit(String),
}

const CODE: u64 = 0x1_0000;
/// `popcnt eax, eax; hlt`
const POPCNT_HLT: [u8; 5] = [0xf3, 0x0f, 0xb8, 0xc0, 0xf4];

impl HostKind {
    /// Runs the probe guest. Takes about a millisecond.
    pub(crate) fn probe(kvm: &Kvm) -> Result<Self, ProbeError> {
        let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        let mut vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
        let ram = Ram::anonymous(RamLayout::new(16 << 20)?)?;
        ram.guest().write_slice(&POPCNT_HLT, GuestAddress(CODE))?;
        set_memslots(&vm, &ram)?;
        enter_long_mode(&vcpu, ram.guest(), CODE, 0)?;
        loop {
            match vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(Self::Hardware),
                Ok(VcpuExit::InternalError) => return Ok(Self::Software),
                Ok(other) => return Err(ProbeError::Exit(format!("{other:?}"))),
                Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
                Err(error) => return Err(call("KVM_RUN")(error).into()),
            }
        }
    }
}

/// Kernel parameters and environment that a software KVM needs, in one line.
pub(crate) fn software_cmdline() -> &'static str {
    "tsc=reliable lpj=1000000 clearcpuid=popcnt rodata=off \
     GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX2,-AVX \
     OPENSSL_ia32cap=~0x1c00180000000000:0x0"
}
