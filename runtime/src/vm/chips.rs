//! The parts of a PC that KVM emulates for the whole machine: interrupt
//! controllers, timer and clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::sys::kvm::{KvmError, call};

/// Pages that KVM needs on older Intel CPUs, in the hole for devices.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// Makes the chips of a VM that has no vCPUs yet.
pub(super) fn make(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_identity_map_address(IDENTITY_MAP).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(TSS).map_err(call("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
    // The speaker port is read while the kernel calibrates its clocks.
    let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..<_>::default() };
    vm.create_pit2(config).map_err(call("KVM_CREATE_PIT2"))
}

/// The state of all chips.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ChipState {
    master: kvm_irqchip,
    slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

/// Reads the state while no vCPU runs.
pub(super) fn save(vm: &VmFd) -> Result<ChipState, KvmError> {
    Ok(ChipState {
        master: chip(vm, KVM_IRQCHIP_PIC_MASTER)?,
        slave: chip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: chip(vm, KVM_IRQCHIP_IOAPIC)?,
        pit: vm.get_pit2().map_err(call("KVM_GET_PIT2"))?,
        clock: vm.get_clock().map_err(call("KVM_GET_CLOCK"))?,
    })
}

fn chip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, KvmError> {
    let mut chip = kvm_irqchip { chip_id, ..<_>::default() };
    vm.get_irqchip(&mut chip).map_err(call("KVM_GET_IRQCHIP"))?;
    Ok(chip)
}

/// Writes the state. The guest's clock goes on from the saved instant; setting
/// it to the time of day is the agent's work.
pub(super) fn restore(vm: &VmFd, state: &ChipState) -> Result<(), KvmError> {
    for chip in [&state.master, &state.slave, &state.ioapic] {
        vm.set_irqchip(chip).map_err(call("KVM_SET_IRQCHIP"))?;
    }
    vm.set_pit2(&state.pit).map_err(call("KVM_SET_PIT2"))?;
    let clock = kvm_clock_data { clock: state.clock.clock, ..<_>::default() };
    vm.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))
}
