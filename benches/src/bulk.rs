//! Forks of a template by the hundred, and one by one among many.

use anyhow::{Context, Result};
use serde::Serialize;

use crate::cold;
use crate::figures::{Spread, real};
use crate::product::Product;

/// Machines of a batch.
const BATCH: u32 = 100;
/// Single forks that are measured after each batch.
const SINGLES: u32 = 20;

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Bulk {
    /// Beside nothing else: from the request until the vCPU runs.
    pub single_us: Spread,
    /// The 99th percentile by the median.
    pub single_p99_to_p50_ratio: f64,
    /// Batches of a hundred: for each machine, from the request until all run.
    pub batch_us_per_fork: Spread,
    /// The same for machines whose program is started cold.
    pub cold_us_per_machine: Spread,
    /// The medians of the last and the one before.
    pub cold_to_batch_ratio: f64,
    /// A hundred after the other, all of which stay.
    pub growth: Growth,
}

/// How forks change with the number of machines.
#[derive(Debug, Serialize)]
pub struct Growth {
    /// Machines that run at the end.
    pub machines: u32,
    /// For each hundred, from the request until all run, for one machine.
    pub batch_us_per_fork: Vec<f64>,
    /// The median of single forks after each hundred.
    pub single_us_p50: Vec<f64>,
    /// The last hundred by the first.
    pub batch_last_to_first_ratio: f64,
    /// Singles after the last hundred by those after the first.
    pub single_last_to_first_ratio: f64,
}

/// Measures forks of a template.
pub fn measure(product: &Product, template: &str, machines: u32, rounds: u32) -> Result<Bulk> {
    // The pool gets what a fork touches, and the first processes are made.
    batch(product, template, true)?;
    let singles = singles(product, template, 10 * SINGLES)?;
    let (mut warm, mut cold) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        eprintln!("measuring: batches, round {}", round + 1);
        warm.push(batch(product, template, true)?);
        cold.push(real(cold::batch(product, usize::try_from(BATCH)?)?) / f64::from(BATCH));
    }
    let single_us = Spread::of(singles);
    let (batch_us_per_fork, cold_us_per_machine) = (Spread::of(warm), Spread::of(cold));
    Ok(Bulk {
        single_p99_to_p50_ratio: single_us.p99 / single_us.p50,
        single_us,
        cold_to_batch_ratio: cold_us_per_machine.p50 / batch_us_per_fork.p50,
        batch_us_per_fork,
        cold_us_per_machine,
        growth: growth(product, template, machines)?,
    })
}

fn growth(product: &Product, template: &str, machines: u32) -> Result<Growth> {
    let (mut batches, mut medians) = (Vec::new(), Vec::new());
    for number in 1..=machines / BATCH {
        eprintln!("measuring: {} machines", number * BATCH);
        batches.push(batch(product, template, false)?);
        medians.push(Spread::of(singles(product, template, SINGLES)?).p50);
    }
    let ratio = |all: &[f64]| {
        let (first, last) = (all.first(), all.last());
        anyhow::Ok(last.context("a hundred")? / first.context("a hundred")?)
    };
    Ok(Growth {
        machines,
        batch_last_to_first_ratio: ratio(&batches)?,
        single_last_to_first_ratio: ratio(&medians)?,
        batch_us_per_fork: batches,
        single_us_p50: medians,
    })
}

/// Makes a hundred at once; microseconds for each.
fn batch(product: &Product, template: &str, remove: bool) -> Result<f64> {
    let forked = product.fork(template, BATCH)?;
    if remove {
        product.remove(&forked.names)?;
    }
    Ok(real(forked.all_ready_us) / f64::from(BATCH))
}

/// Makes some one by one, and removes them; microseconds for each.
fn singles(product: &Product, template: &str, count: u32) -> Result<Vec<f64>> {
    let (mut names, mut taken) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let forked = product.fork(template, 1)?;
        taken.extend(forked.ready_us.into_iter().map(real));
        names.extend(forked.names);
    }
    product.remove(&names)?;
    Ok(taken)
}
