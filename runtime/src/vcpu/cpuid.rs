//! The CPUID table of a machine.
//!
//! Everything that the host's KVM supports, minus what a software KVM cannot
//! emulate for the guest's kernel (see [`HostKind`]). The table is part of
//! the machine's state: a machine that continues keeps the table that it
//! booted with, and a host that lacks one of its features refuses it.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::host::HostKind;
use crate::sys::kvm::{KvmError, call};

/// Why a CPUID table does not fit.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CpuidError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// More entries than KVM takes.
    #[error("the CPUID table has {0} entries, more than {KVM_MAX_CPUID_ENTRIES}")]
    TooLong(usize),
    /// The machine was saved on a host with more features.
    #[error(
        "CPU feature missing on this host: CPUID leaf {leaf:#x} index {index} {register} bits {missing:#x}"
    )]
    Missing {
        /// Leaf.
        leaf: u32,
        /// Subleaf.
        index: u32,
        /// Register.
        register: &'static str,
        /// Bits that the machine has and this host lacks.
        missing: u32,
    },
}

const LEAF_FEATURES: u32 = 1;
const LEAF_EXTENDED_FEATURES: u32 = 7;
const LEAF_TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const LEAF_XSAVE: u32 = 0xd;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;

/// A machine's CPUID table, the same for each vCPU but for its number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CpuTable {
    entries: Vec<kvm_cpuid_entry2>,
}

impl CpuTable {
    /// What a machine that boots on this host gets.
    pub(crate) fn of_host(kvm: &Kvm, host: HostKind) -> Result<Self, CpuidError> {
        let mut table = Self::supported(kvm)?;
        if host == HostKind::Software {
            table.mask_for_software();
        }
        Ok(table)
    }

    /// Everything that KVM offers on this host.
    pub(crate) fn supported(kvm: &Kvm) -> Result<Self, CpuidError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self { entries: supported.as_slice().to_vec() })
    }

    /// Leaves out what `host.rs` documents for a software KVM.
    fn mask_for_software(&mut self) {
        self.entries.retain(|entry| entry.function <= 6 || entry.function >= 0x4000_0000);
        for entry in &mut self.entries {
            match entry.function {
                0 => entry.eax = 6,
                // MONITOR and CMPXCHG16B.
                LEAF_FEATURES => entry.ecx &= !(1 << 3 | 1 << 13),
                // Hypercalls hang the vCPU: PV_UNHALT, PV_TLB_FLUSH,
                // PV_SEND_IPI, PV_SCHED_YIELD.
                LEAF_KVM_FEATURES => entry.eax &= !(1 << 7 | 1 << 9 | 1 << 11 | 1 << 13),
                // MONITORX; RDTSCP.
                LEAF_AMD_FEATURES => {
                    entry.ecx &= !(1 << 29);
                    entry.edx &= !(1 << 27);
                }
                _ => {}
            }
        }
    }

    /// Checks that a host, which offers this much, has every feature of the table.
    pub(crate) fn check_against(&self, host: &Self) -> Result<(), CpuidError> {
        for entry in &self.entries {
            let same = |other: &&kvm_cpuid_entry2| {
                (other.function, other.index) == (entry.function, entry.index)
            };
            let none = kvm_cpuid_entry2::default();
            let there = host.entries.iter().find(same).unwrap_or(&none);
            for (register, wanted, offered) in feature_words(entry, there) {
                let missing = wanted & !offered;
                if missing != 0 {
                    let (leaf, index) = (entry.function, entry.index);
                    return Err(CpuidError::Missing { leaf, index, register, missing });
                }
            }
        }
        Ok(())
    }

    /// Gives the table to vCPU number `id`.
    pub(crate) fn install(&self, vcpu: &VcpuFd, id: u8, vcpus: u8) -> Result<(), CpuidError> {
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            if entry.function == LEAF_FEATURES {
                // Initial APIC id and number of logical processors.
                entry.ebx = (entry.ebx & 0xffff) | u32::from(id) << 24 | u32::from(vcpus) << 16;
                let hyperthreads = 1 << 28;
                entry.edx = (entry.edx & !hyperthreads) | u32::from(vcpus > 1) << 28;
            } else if LEAF_TOPOLOGY.contains(&entry.function) {
                entry.edx = u32::from(id);
            }
        }
        let table =
            CpuId::from_entries(&entries).map_err(|_| CpuidError::TooLong(entries.len()))?;
        vcpu.set_cpuid2(&table).map_err(call("KVM_SET_CPUID2"))?;
        Ok(())
    }
}

/// The registers of a leaf that are sets of features, as (name, wanted, offered).
fn feature_words(
    wanted: &kvm_cpuid_entry2,
    offered: &kvm_cpuid_entry2,
) -> Vec<(&'static str, u32, u32)> {
    // Set by KVM at run time from the guest's own state, not by the host.
    let dynamic = 1 << 27 | 1 << 31;
    let eax = ("EAX", wanted.eax, offered.eax);
    let ebx = ("EBX", wanted.ebx, offered.ebx);
    let ecx = ("ECX", wanted.ecx & !dynamic, offered.ecx);
    let edx = ("EDX", wanted.edx, offered.edx);
    match (wanted.function, wanted.index) {
        (LEAF_FEATURES, _) => vec![ecx, ("EDX", wanted.edx & !(1 << 28), offered.edx)],
        (LEAF_EXTENDED_FEATURES, 0) => vec![ebx, ("ECX", wanted.ecx, offered.ecx), edx],
        (LEAF_EXTENDED_FEATURES, 1) | (LEAF_XSAVE, 0 | 1) | (LEAF_KVM_FEATURES, _) => vec![eax],
        (LEAF_AMD_FEATURES, _) => vec![("ECX", wanted.ecx, offered.ecx), edx],
        _ => Vec::new(),
    }
}

const _: () = assert!(KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 1);

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..<_>::default() }
    }

    #[test]
    fn a_software_host_loses_only_what_it_cannot_do() {
        let mut table = CpuTable {
            entries: vec![
                entry(0, [0x10, 1, 2, 3]),
                entry(1, [0, 0, !0, !0]),
                entry(7, [0, !0, !0, !0]),
                entry(0xd, [7, 0, 0, 0]),
                entry(LEAF_KVM_FEATURES, [!0, 0, 0, 0]),
                entry(LEAF_AMD_FEATURES, [0, 0, !0, !0]),
            ],
        };
        table.mask_for_software();
        let leaves: Vec<u32> = table.entries.iter().map(|entry| entry.function).collect();
        assert_eq!(leaves, [0, 1, LEAF_KVM_FEATURES, LEAF_AMD_FEATURES]);
        assert_eq!(table.entries[0].eax, 6);
        assert_eq!(!table.entries[1].ecx, 1 << 3 | 1 << 13);
        assert_eq!(!table.entries[2].eax, 0x2a80);
        assert_eq!(!table.entries[3].edx, 1 << 27);
    }

    #[test]
    fn a_host_that_lacks_a_feature_is_named() {
        let machine = CpuTable { entries: vec![entry(1, [0, 0, 1 << 28, 1])] };
        let host = CpuTable { entries: vec![entry(1, [0, 0, 0, 1])] };
        let error = machine.check_against(&host).unwrap_err().to_string();
        assert!(error.contains("leaf 0x1") && error.contains("ECX bits 0x10000000"), "{error}");
        machine.check_against(&machine).unwrap();
    }

    #[test]
    fn a_host_that_lacks_a_whole_leaf_is_named() {
        let machine = CpuTable { entries: vec![entry(7, [0, 1, 0, 0])] };
        let error = machine.check_against(&CpuTable { entries: Vec::new() }).unwrap_err();
        assert!(matches!(error, CpuidError::Missing { leaf: 7, register: "EBX", .. }));
    }
}
