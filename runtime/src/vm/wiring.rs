//! Connecting a virtio device to KVM: notifications come and interrupts go
//! through eventfds, without a detour through the vCPU's thread.

use kvm_ioctls::{IoEventAddress, VmFd};

use super::boot::VirtioWindow;
use super::bus::WINDOW;
use crate::devices::virtio::Transport;
use crate::devices::{SERIAL_IRQ, Serial};
use crate::memory::MMIO_BASE;
use crate::sys::kvm::{KvmError, call};

/// The interrupts of a PC that no other device of this machine uses.
const INTERRUPTS: [u32; 17] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// More virtio devices than there are interrupts for.
pub(super) const DEVICES_MAX: usize = INTERRUPTS.len();

/// Where device number `index` lies.
pub(super) fn window(index: usize) -> Option<VirtioWindow> {
    let irq = *INTERRUPTS.get(index)?;
    Some(VirtioWindow { address: MMIO_BASE + WINDOW * index as u64, irq })
}

/// Connects a device.
pub(super) fn connect(vm: &VmFd, device: &Transport, at: VirtioWindow) -> Result<(), KvmError> {
    vm.register_irqfd(device.interrupt(), at.irq).map_err(call("KVM_IRQFD"))?;
    let register = IoEventAddress::Mmio(at.address + Transport::NOTIFY_OFFSET);
    for (queue, notify) in (0u32..).zip(device.notify()) {
        vm.register_ioevent(notify, &register, queue).map_err(call("KVM_IOEVENTFD"))?;
    }
    Ok(())
}

/// Connects the serial port.
pub(super) fn connect_serial(vm: &VmFd, serial: &Serial) -> Result<(), KvmError> {
    vm.register_irqfd(serial.interrupt(), SERIAL_IRQ).map_err(call("KVM_IRQFD"))
}
