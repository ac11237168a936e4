//! A machine of one vCPU that runs the bench guest.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes a bare address")]

use std::time::Instant;

use anyhow::{Context, Result, bail};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::guest::{CODE, GDT, PAGE, PML4, PORT, TSS, Walk};
use crate::mapping::Mapping;

/// A machine, stopped at a port access.
#[derive(Debug)]
pub struct Machine {
    vcpu: VcpuFd,
    // Freed in this order: first the vCPU, then the machine, then its memory.
    _vm: VmFd,
    memory: Mapping,
}

/// What making a machine took, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Steps {
    /// `KVM_CREATE_VM`.
    pub create_vm_ns: u64,
    /// Mapping the memory, and registering it if it is a pool.
    pub map_ns: u64,
    /// `KVM_SET_USER_MEMORY_REGION`.
    pub memslot_ns: u64,
    /// `KVM_CREATE_VCPU` and all of its state.
    pub vcpu_ns: u64,
    /// From `KVM_RUN` to the exit of the first instruction.
    pub first_instruction_ns: u64,
}

impl Steps {
    /// All of it.
    pub fn total_ns(&self) -> u64 {
        self.create_vm_ns + self.map_ns + self.memslot_ns + self.vcpu_ns + self.first_instruction_ns
    }
}

/// Measures the steps of a sequence.
#[derive(Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts it.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Nanoseconds since the last call, or since it was started.
    pub fn lap_ns(&mut self) -> u64 {
        let before = std::mem::replace(&mut self.0, Instant::now());
        u64::try_from(self.0.duration_since(before).as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Machine {
    /// Makes a machine of the memory that `map` yields, and runs its first
    /// instruction. The order is that of the design: the machine first, the
    /// memslot last.
    pub fn fork(kvm: &Kvm, map: impl FnOnce() -> Result<Mapping>) -> Result<(Self, Steps)> {
        let mut machine = Assembly::default();
        machine.create(kvm)?;
        machine.map(map)?;
        machine.finish()
    }

    /// Runs until the guest has made a walk, and returns the nanoseconds.
    pub fn walk(&mut self, walk: &Walk) -> Result<u64> {
        self.prepare(walk)?;
        let mut watch = Stopwatch::start();
        self.run()?;
        Ok(watch.lap_ns())
    }

    /// Makes a walk the next thing that the guest does.
    pub fn prepare(&self, walk: &Walk) -> Result<()> {
        let mut registers = self.vcpu.get_regs().context("KVM_GET_REGS")?;
        registers.r8 = walk.seed;
        registers.r9 = walk.factor;
        registers.r10 = walk.step;
        registers.r11 = walk.mask;
        registers.r12 = walk.base * PAGE as u64;
        registers.r13 = u64::from(walk.write);
        registers.rcx = walk.count;
        self.vcpu.set_regs(&registers).context("KVM_SET_REGS")
    }

    /// Its vCPU.
    pub fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// Its memory.
    pub fn memory(&self) -> &Mapping {
        &self.memory
    }

    fn run(&mut self) -> Result<()> {
        run(&mut self.vcpu)
    }
}

fn run(vcpu: &mut VcpuFd) -> Result<()> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, _)) => return Ok(()),
            Ok(exit) => bail!("the guest stopped at {exit:?}"),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error).context("KVM_RUN"),
        }
    }
}

/// A machine in the making, with the time that each step took.
#[derive(Debug, Default)]
pub struct Assembly {
    steps: Steps,
    vm: Option<VmFd>,
    memory: Option<Mapping>,
}

impl Assembly {
    /// Makes the empty machine.
    pub fn create(&mut self, kvm: &Kvm) -> Result<()> {
        let mut watch = Stopwatch::start();
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        self.steps.create_vm_ns = watch.lap_ns();
        self.vm = Some(vm);
        Ok(())
    }

    /// Gives it memory, which KVM does not yet know.
    pub fn map(&mut self, map: impl FnOnce() -> Result<Mapping>) -> Result<&Mapping> {
        let mut watch = Stopwatch::start();
        let memory = map()?;
        self.steps.map_ns = watch.lap_ns();
        Ok(self.memory.insert(memory))
    }

    /// The memory, once it is mapped.
    pub fn memory(&self) -> Option<&Mapping> {
        self.memory.as_ref()
    }

    /// Sets the memslot, makes the vCPU and runs its first instruction.
    pub fn finish(self) -> Result<(Machine, Steps)> {
        let Self { mut steps, vm, memory } = self;
        let vm = vm.context("the machine is created first")?;
        let memory = memory.context("the memory is mapped first")?;
        let mut watch = Stopwatch::start();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: memory.len() as u64,
            userspace_addr: memory.address(),
        };
        // SAFETY: the mapping lives at least as long as the machine does; the
        // guest changes only bytes to which no reference exists.
        unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        steps.memslot_ns = watch.lap_ns();
        let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        set_state(&vcpu)?;
        steps.vcpu_ns = watch.lap_ns();
        run(&mut vcpu)?;
        steps.first_instruction_ns = watch.lap_ns();
        Ok((Machine { vcpu, _vm: vm, memory }, steps))
    }
}

/// Long mode, ring 3, at the program.
fn set_state(vcpu: &VcpuFd) -> Result<()> {
    let mut special = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 8 | 3,
        type_: 11,
        present: 1,
        dpl: 3,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: 16 | 3, type_: 3, db: 1, l: 0, ..code };
    special.cs = code;
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    special.tr = kvm_segment {
        base: TSS,
        limit: 0x67,
        selector: 24,
        type_: 11,
        present: 1,
        ..kvm_segment::default()
    };
    special.gdt = kvm_dtable { base: GDT, limit: 0x27, ..kvm_dtable::default() };
    special.cr0 = 0x8005_0033;
    special.cr3 = PML4;
    special.cr4 = 0x20;
    special.efer = 0xD01;
    vcpu.set_sregs(&special).context("KVM_SET_SREGS")?;
    // I/O privilege for ring 3, no interrupts.
    let registers = kvm_regs { rip: CODE, rflags: 0x3002, ..kvm_regs::default() };
    vcpu.set_regs(&registers).context("KVM_SET_REGS")
}
