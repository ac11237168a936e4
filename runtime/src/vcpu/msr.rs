//! Model-specific registers.
//!
//! KVM lists the registers that make up a vCPU's state, but may refuse single
//! ones: a list is read and written around the refusals.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::sys::kvm::{KvmError, call};

/// `IA32_TIME_STAMP_COUNTER`.
const TSC: u32 = 0x10;
/// `IA32_TSC_ADJUST`, which writing the TSC changes.
const TSC_ADJUST: u32 = 0x3b;
/// `IA32_TSC_DEADLINE`: armed against the TSC, and lost when the LAPIC is set.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// At most this many in one call (`MAX_IO_MSRS`).
const BATCH: usize = 256;

/// The registers that this host's KVM counts as state.
pub(crate) fn listed(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm.get_msr_index_list().map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(list.as_slice().to_vec())
}

/// Reads all that KVM lets us read, in the order given.
pub(super) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut entries: Vec<kvm_msr_entry> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..<_>::default() }).collect();
    let mut read = Vec::with_capacity(entries.len());
    walk(&mut entries, |batch| {
        let mut msrs = batch_of(batch);
        let done = vcpu.get_msrs(&mut msrs).map_err(call("KVM_GET_MSRS"))?;
        read.extend_from_slice(&msrs.as_slice()[..done]);
        Ok(done)
    })?;
    Ok(read)
}

/// Writes all, and returns the indices that KVM refused.
pub(super) fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<Vec<u32>, KvmError> {
    let mut entries = entries.to_vec();
    walk(&mut entries, |batch| vcpu.set_msrs(&batch_of(batch)).map_err(call("KVM_SET_MSRS")))
}

/// Orders registers as they must be written: the TSC before everything that
/// is relative to it. The deadline is left to the caller.
pub(super) fn in_write_order(entries: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    let rank = |entry: &kvm_msr_entry| match entry.index {
        TSC => 0,
        TSC_ADJUST => 1,
        _ => 2,
    };
    let mut ordered: Vec<_> =
        entries.iter().filter(|entry| entry.index != TSC_DEADLINE).copied().collect();
    ordered.sort_by_key(rank);
    ordered
}

fn batch_of(entries: &[kvm_msr_entry]) -> Msrs {
    Msrs::from_entries(entries).expect("a batch is not longer than KVM takes")
}

/// Calls `step` on the rest of the list until nothing is left; `step` returns
/// how many it did, and stops at the first refusal, which is skipped.
fn walk(
    entries: &mut [kvm_msr_entry],
    mut step: impl FnMut(&[kvm_msr_entry]) -> Result<usize, KvmError>,
) -> Result<Vec<u32>, KvmError> {
    let mut refused = Vec::new();
    let mut rest: &[kvm_msr_entry] = entries;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let done = step(batch)?.min(batch.len());
        rest = &rest[done..];
        if done < batch.len() {
            refused.push(rest[0].index);
            rest = &rest[1..];
        }
    }
    Ok(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(indices: &[u32]) -> Vec<kvm_msr_entry> {
        indices.iter().map(|&index| kvm_msr_entry { index, ..<_>::default() }).collect()
    }

    #[test]
    fn refusals_are_skipped_and_named() {
        let mut list = entries(&[1, 2, 3, 4, 5]);
        let mut seen = Vec::new();
        let refused = walk(&mut list, |batch| {
            let done = batch.iter().take_while(|entry| ![2, 5].contains(&entry.index)).count();
            seen.extend(batch[..done].iter().map(|entry| entry.index));
            Ok(done)
        });
        assert_eq!(refused.unwrap(), [2, 5]);
        assert_eq!(seen, [1, 3, 4]);
    }

    #[test]
    fn the_tsc_comes_first_and_the_deadline_not_at_all() {
        let ordered = in_write_order(&entries(&[0xc000_0080, TSC_DEADLINE, TSC_ADJUST, TSC]));
        let indices: Vec<u32> = ordered.iter().map(|entry| entry.index).collect();
        assert_eq!(indices, [TSC, TSC_ADJUST, 0xc000_0080]);
    }
}
