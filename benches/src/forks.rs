//! How long a fork of a template takes until its vCPU runs, beside a machine
//! of plain memory that is made by the same calls with the same state.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::family::Fork;
use crate::figures::Spread;
use crate::machine::{Steps, Stopwatch};
use crate::orders::{Answer, Kind, Order};
use crate::pools::Pool;

/// The steps of making a machine.
#[derive(Debug, Serialize)]
pub struct StepSpreads {
    /// `KVM_CREATE_VM`.
    pub create_vm_us: Spread,
    /// Mapping the memory; for a pool, registering it.
    pub map_us: Spread,
    /// `KVM_SET_USER_MEMORY_REGION`.
    pub memslot_us: Spread,
    /// The vCPU and its state.
    pub vcpu_us: Spread,
    /// From `KVM_RUN` to the exit of the first instruction.
    pub first_instruction_us: Spread,
    /// All of it.
    pub total_us: Spread,
}

impl StepSpreads {
    fn of(steps: &[Steps]) -> Self {
        let spread = |part: fn(&Steps) -> u64| Spread::of_ns_in_us(steps.iter().map(part));
        Self {
            create_vm_us: spread(|steps| steps.create_vm_ns),
            map_us: spread(|steps| steps.map_ns),
            memslot_us: spread(|steps| steps.memslot_ns),
            vcpu_us: spread(|steps| steps.vcpu_ns),
            first_instruction_us: spread(|steps| steps.first_instruction_ns),
            total_us: spread(Steps::total_ns),
        }
    }
}

/// Making machines.
#[derive(Debug, Serialize)]
pub struct Forks {
    /// On a private mapping of a memory file that holds everything.
    pub bare: StepSpreads,
    /// On a pool, registered with userfaultfd.
    pub pooled: StepSpreads,
    /// The medians of the totals, one by the other.
    pub pooled_to_bare_p50_ratio: f64,
    /// Giving the userfaultfd to the page server: two messages over the
    /// channel, from the bench's process.
    pub hand_over_us: Spread,
    /// From the order to an idle process until its vCPU has run, hand-over
    /// and messages included.
    pub order_to_running_us: Spread,
}

/// Measures in as many fresh processes as asked for, `rounds` of each kind in
/// every one, in turn, the first uncounted. The template has run already.
pub fn measure(image: &File, pool: &Pool, processes: u32, rounds: u32) -> Result<Forks> {
    let (mut bare, mut pooled) = (Vec::new(), Vec::new());
    let (mut hand_over, mut whole) = (Vec::new(), Vec::new());
    for _ in 0..processes {
        let fork = Fork::start()?;
        let order = Order::Race { rounds: rounds + 1 };
        match fork.order(&order, &[image.as_fd(), pool.memory().as_fd()])?.0 {
            Answer::Raced { bare: plain, pooled: shared } => {
                bare.extend(plain.into_iter().skip(1));
                pooled.extend(shared.into_iter().skip(1));
            }
            other => bail!("unexpected {other:?}"),
        }
        let mut total = Stopwatch::start();
        let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
        let mut watch = Stopwatch::start();
        pool.attach(&mapped)?;
        hand_over.push(watch.lap_ns());
        fork.order(&Order::Run, &[])?;
        whole.push(total.lap_ns());
    }
    let (bare, pooled) = (StepSpreads::of(&bare), StepSpreads::of(&pooled));
    Ok(Forks {
        pooled_to_bare_p50_ratio: pooled.total_us.p50 / bare.total_us.p50,
        bare,
        pooled,
        hand_over_us: Spread::of_ns_in_us(hand_over),
        order_to_running_us: Spread::of_ns_in_us(whole),
    })
}

/// Runs a first fork, so that the pool holds what a template has touched.
pub fn run_template(pool: &Pool) -> Result<()> {
    let fork = Fork::start()?;
    let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
    pool.attach(&mapped)?;
    fork.order(&Order::Run, &[])?;
    Ok(())
}
