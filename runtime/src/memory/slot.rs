//! Giving RAM to a VM.
#![expect(unsafe_code, reason = "KVM takes a raw address")]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use super::ram::Ram;
use crate::sys::kvm::{KvmError, call};

/// Makes the RAM visible to the guest, one slot per range. The last step in
/// making a machine. The caller keeps `ram` for as long as the VM can run.
pub(crate) fn set_memslots(vm: &VmFd, ram: &Ram) -> Result<(), KvmError> {
    for (slot, range) in (0..).zip(ram.layout().ranges()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: range.gpa,
            memory_size: range.len,
            userspace_addr: ram.mapping().address() + range.offset,
            flags: 0,
        };
        // SAFETY: the range is part of the mapping, which the caller keeps
        // for as long as the VM can run.
        let set = unsafe { vm.set_user_memory_region(region) };
        set.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}
