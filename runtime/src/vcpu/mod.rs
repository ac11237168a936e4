//! Virtual CPUs: what they can do, how they start, run and stop, and all of
//! their state.

mod control;
mod cpuid;
mod exit;
mod host;
mod longmode;
mod msr;
mod state;

pub(crate) use control::{Vcpu, VcpuError};
pub(crate) use cpuid::{CpuTable, CpuidError};
pub(crate) use exit::{Bus, End};
pub(crate) use host::{HostKind, ProbeError, software_cmdline};
pub(crate) use longmode::{LongModeError, enter_long_mode};
pub(crate) use msr::listed as listed_msrs;
pub(crate) use state::{VcpuState, VcpuStateError, restore_vcpu, save_vcpu};
