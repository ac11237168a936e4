//! What a vCPU wants when it leaves the guest.

use kvm_ioctls::{VcpuExit, VcpuFd};

/// Devices as a vCPU reaches them. Unknown addresses read as ones and ignore
/// writes, as on a PC.
pub(crate) trait Bus: Send + Sync {
    /// Port input.
    fn port_in(&self, port: u16, data: &mut [u8]);
    /// Port output; an error ends the machine.
    fn port_out(&self, port: u16, data: &[u8]) -> Result<(), End>;
    /// Memory-mapped input.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// Memory-mapped output.
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// How a machine came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    /// For a person.
    pub(crate) reason: String,
    /// Whether the guest asked for it.
    pub(crate) clean: bool,
}

impl End {
    /// The guest asked for it.
    pub(crate) fn clean(reason: &str) -> Self {
        Self { reason: reason.to_owned(), clean: true }
    }

    /// Something went wrong.
    pub(crate) fn failed(reason: String) -> Self {
        Self { reason, clean: false }
    }
}

/// Why `enter` returned.
#[derive(Debug)]
pub(crate) enum Left {
    /// The exit was handled; enter again.
    Handled,
    /// A signal or `immediate_exit`.
    Kicked,
    /// The machine is over.
    Over(End),
}

/// Runs the guest until its next exit and handles that.
pub(crate) fn enter(vcpu: &mut VcpuFd, bus: &dyn Bus) -> Left {
    let handled = match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            bus.port_in(port, data);
            Ok(())
        }
        Ok(VcpuExit::IoOut(port, data)) => bus.port_out(port, data),
        Ok(VcpuExit::MmioRead(address, data)) => {
            bus.mmio_read(address, data);
            Ok(())
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            bus.mmio_write(address, data);
            Ok(())
        }
        Ok(VcpuExit::Intr) => return Left::Kicked,
        Ok(VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => Ok(()),
        Ok(VcpuExit::Shutdown) => Err(End::failed("the guest shut down by a triple fault".into())),
        Ok(VcpuExit::SystemEvent(1 | 2, _)) => Err(End::clean("the guest powered off")),
        Ok(VcpuExit::InternalError) => Err(internal_error(vcpu)),
        Ok(VcpuExit::FailEntry(reason, cpu)) => Err(End::failed(format!(
            "the host CPU {cpu} refused to enter the guest: hardware reason {reason:#x}"
        ))),
        Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
            Err(End::failed(format!("guest memory at {gpa:#x}, {size} bytes, cannot be reached")))
        }
        Ok(other) => Err(End::failed(format!("unexpected exit from the guest: {other:?}"))),
        Err(error) => match error.errno() {
            libc::EINTR => return Left::Kicked,
            libc::EAGAIN => Ok(()),
            _ => Err(End::failed(format!("KVM_RUN: {error}{}", place(vcpu)))),
        },
    };
    match handled {
        Ok(()) => Left::Handled,
        Err(end) => Left::Over(end),
    }
}

/// Lets KVM finish the last exit without running the guest, so that the
/// registers can be read.
pub(crate) fn settle(vcpu: &mut VcpuFd, bus: &dyn Bus) -> Option<End> {
    loop {
        vcpu.set_kvm_immediate_exit(1);
        let left = enter(vcpu, bus);
        vcpu.set_kvm_immediate_exit(0);
        match left {
            Left::Kicked => return None,
            Left::Handled => {}
            Left::Over(end) => return Some(end),
        }
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> End {
    let suberror = emulation::suberror(vcpu);
    let bytes = emulation::instruction(vcpu);
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let hex = if hex.is_empty() { "unknown".to_owned() } else { hex.join(" ") };
    End::failed(format!(
        "KVM could not emulate the guest (internal error {suberror}){}, instruction bytes {hex}",
        place(vcpu)
    ))
}

fn place(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => {
            format!(" at RIP {:#x}, ring {}", regs.rip, sregs.cs.selector & 3)
        }
        _ => String::new(),
    }
}

/// The part of `kvm_run` that an internal error fills.
mod emulation {
    #![expect(unsafe_code, reason = "kvm_run is a union that the exit reason selects")]

    use kvm_ioctls::VcpuFd;

    const EMULATION_FAILED: u32 = 1;
    const HAS_BYTES: u64 = 1;

    /// Which internal error it was. Called after `KVM_EXIT_INTERNAL_ERROR`.
    pub(super) fn suberror(vcpu: &mut VcpuFd) -> u32 {
        // SAFETY: every member of the union is plain data; after this exit
        // the kernel has filled this one.
        unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }

    /// The instruction that could not be emulated, if KVM tells.
    pub(super) fn instruction(vcpu: &mut VcpuFd) -> Vec<u8> {
        if suberror(vcpu) != EMULATION_FAILED {
            return Vec::new();
        }
        // SAFETY: as in `suberror`; with this suberror the kernel filled this
        // member.
        let failure = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.emulation_failure };
        if failure.ndata < 4 || failure.flags & HAS_BYTES == 0 {
            return Vec::new();
        }
        // SAFETY: the flag says that the instruction bytes are there.
        let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        bytes.insn_bytes[..usize::from(bytes.insn_size).min(bytes.insn_bytes.len())].to_vec()
    }
}
