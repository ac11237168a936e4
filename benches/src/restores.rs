//! What it brings to fetch a working set before it is asked for.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use crate::family::Fork;
use crate::figures::{Spread, real};
use crate::guest::Walk;
use crate::orders::{Kind, Order};
use crate::pools::{Pool, Stored};

/// Restores with and without prefetching, in turn.
#[derive(Debug, Default, Serialize)]
pub struct Restores {
    /// From the request until the work is done, every page when it is touched.
    pub without_us: Option<Spread>,
    /// The same with prefetching.
    pub with_us: Option<Spread>,
    /// The medians of the last and the first.
    pub with_to_without_p50_ratio: f64,
    /// Faults that had to wait for the store, without: the median.
    pub store_faults_without: f64,
    /// The same with prefetching.
    pub store_faults_with: f64,
    /// Compressed bytes of the working set: what a restore without read.
    pub working_set_bytes: u64,
    /// Compressed bytes that a restore with prefetching read, by the former.
    pub read_to_working_set_ratio: f64,
}

/// A fork on a pool that has everything: what mapping it whole would bring.
#[derive(Debug, Serialize)]
pub struct Resident {
    /// The walk, each fault mapping what the kernel maps around it.
    pub walk_us: Spread,
    /// Mapping all pages at once.
    pub populate_us: Spread,
    /// The walk after that.
    pub walk_after_populate_us: Spread,
}

/// One restore.
#[derive(Debug, Clone, Copy, Default)]
struct Restore {
    ns: u64,
    store_faults: u64,
    bytes: u64,
}

impl Restores {
    fn of(without: &[Restore], with: &[Restore]) -> Self {
        let times = |all: &[Restore]| Spread::of_ns_in_us(all.iter().map(|one| one.ns));
        let faults = |all: &[Restore]| Spread::of(all.iter().map(|one| real(one.store_faults))).p50;
        let working_set_bytes = without.first().map_or(0, |one| one.bytes);
        let read = with.iter().map(|one| one.bytes).max().unwrap_or(0);
        let (without_us, with_us) = (times(without), times(with));
        Self {
            with_to_without_p50_ratio: with_us.p50 / without_us.p50,
            store_faults_without: faults(without),
            store_faults_with: faults(with),
            working_set_bytes,
            read_to_working_set_ratio: real(read) / real(working_set_bytes.max(1)),
            without_us: Some(without_us),
            with_us: Some(with_us),
        }
    }
}

/// A guest in ring 3 that reads `pages` pages, scattered, on a pool that is
/// empty, with packs that are not in the page cache.
pub fn ring_3(stored: &Stored, pages: u64, mask: u64, rounds: u32) -> Result<Restores> {
    let walk = Walk::scattered(5, pages.min(mask), mask, false);
    let (mut without, mut with) = (Vec::new(), Vec::new());
    let mut touched = Vec::new();
    for _ in 0..rounds {
        without.push(restore(stored, walk, &[], &mut touched)?);
        let expected = touched.clone();
        with.push(restore(stored, walk, &expected, &mut Vec::new())?);
    }
    Ok(Restores::of(&without, &with))
}

fn restore(
    stored: &Stored,
    walk: Walk,
    expected: &[(coppice_runtime::protocol::PoolId, u64)],
    touched: &mut Vec<(coppice_runtime::protocol::PoolId, u64)>,
) -> Result<Restore> {
    let pool = stored.open_pool()?;
    let fork = Fork::start()?;
    let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
    let machine = pool.attach(&mapped)?;
    stored.drop_from_cache()?;
    let begun = Instant::now();
    fork.order(&Order::Run, &[])?;
    if !expected.is_empty() {
        pool.pager().prefetch(machine, expected.to_vec())?;
    }
    fork.walk(walk)?;
    let ns = u64::try_from(begun.elapsed().as_nanos())?;
    *touched = pool.pager().touched(machine)?;
    let bytes = pool.stats()?.bytes_read;
    let faults = pool.pager().detach(machine)?;
    Ok(Restore { ns, store_faults: faults.store_faults, bytes })
}

/// Forks of a pool that has everything.
pub fn resident(image: &File, pages: u64, mask: u64, rounds: u32) -> Result<Resident> {
    let pool = Pool::in_memory(image)?;
    let walk = Walk::scattered(5, pages.min(mask), mask, false);
    let forked = || -> Result<Fork> {
        let fork = Fork::start()?;
        let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
        pool.attach(&mapped)?;
        fork.order(&Order::Run, &[])?;
        Ok(fork)
    };
    // Everything is fetched once, and that is not counted.
    forked()?.order(&Order::Populate, &[])?;
    let (mut plain, mut populate, mut after) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        plain.push(forked()?.walk(walk)?);
        let fork = forked()?;
        let begun = Instant::now();
        fork.order(&Order::Populate, &[])?;
        populate.push(u64::try_from(begun.elapsed().as_nanos())?);
        after.push(fork.walk(walk)?);
    }
    Ok(Resident {
        walk_us: Spread::of_ns_in_us(plain),
        populate_us: Spread::of_ns_in_us(populate),
        walk_after_populate_us: Spread::of_ns_in_us(after),
    })
}

/// A snapshot of a Linux guest in a store, and the program that restores it.
#[derive(Debug, Clone)]
pub struct Linux {
    /// The program.
    pub coppice: PathBuf,
    /// The store.
    pub store: PathBuf,
    /// The snapshot.
    pub snapshot: String,
    /// What the agent is to run; the restore ends with its reply.
    pub command: Vec<String>,
}

const NAME: &str = "restored";

impl Linux {
    /// Restores in turn, each with a new supervisor.
    pub fn measure(&self, rounds: u32) -> Result<Restores> {
        drop(std::fs::remove_dir_all(self.store.join("working-sets")));
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            without.push(self.restore(&["--no-prefetch"])?);
            with.push(self.restore(&[])?);
        }
        self.run(&["serve", "--stop"])?;
        Ok(Restores::of(&without, &with))
    }

    fn restore(&self, arguments: &[&str]) -> Result<Restore> {
        self.run(&["serve", "--stop"])?;
        self.run(&["stats"])?;
        drop_from_cache(&self.store)?;
        let begun = Instant::now();
        self.run(&[&["run", &self.snapshot, "--name", NAME], arguments].concat())?;
        let command: Vec<&str> = self.command.iter().map(String::as_str).collect();
        self.run(&[&["exec", NAME, "--"], command.as_slice()].concat())?;
        let ns = u64::try_from(begun.elapsed().as_nanos())?;
        let (pools, machines) = (self.run(&["pools"])?, self.run(&["ps"])?);
        let bytes = pools["pools"].as_array().into_iter().flatten();
        let bytes = bytes.filter_map(|pool| pool["bytes_read"].as_u64()).sum();
        let mut lines = machines["machines"].as_array().into_iter().flatten();
        let line = lines.find(|line| line["name"] == NAME).context("the machine")?;
        let store_faults = line["store_faults"].as_u64().context("its faults")?;
        self.run(&["rm", "--force", NAME])?;
        Ok(Restore { ns, store_faults, bytes })
    }

    /// Runs the program; what it prints, if that is JSON.
    fn run(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.coppice);
        command.arg("--store").arg(&self.store).arg("--json").args(arguments);
        let output = command.stdin(Stdio::null()).output().context("the program")?;
        if !output.status.success() {
            bail!("{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
    }
}

/// Has the kernel forget the packs of a store.
pub fn drop_from_cache(store: &Path) -> Result<()> {
    for entry in std::fs::read_dir(store.join("packs"))? {
        let pack = File::open(entry?.path())?;
        pack.sync_all()?;
        rustix::fs::fadvise(&pack, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}
