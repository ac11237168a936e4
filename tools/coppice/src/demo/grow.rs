//! Growing the forks, and what they cost.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::Demonstration;
use super::report::Spread;
use crate::client::unexpected;
use crate::output::bytes;
use crate::rpc::{MachineLine, Reply, Request};

/// A fork that has answered its first command.
struct Grown {
    ready_us: u64,
    reply_us: u64,
    machine_id: String,
}

impl Demonstration<'_> {
    /// Grows the forks, as many at a time as the host has CPUs. Each is timed
    /// from its own request to the reply to its first command.
    pub(super) fn regrow(&mut self) -> Result<Vec<String>> {
        let count = self.options.forks;
        if count == 0 {
            bail!("--forks must be at least 1");
        }
        self.say(&format!("regrowing it as {count} forks, lazily, from the store"));
        let names: Vec<String> = (1..=count).map(|number| format!("fork-{number}")).collect();
        // The first alone: it is the one that fills the pool.
        let mut grown = vec![self.grow(&names[0])?];
        self.say("the first fork answers");
        grown.extend(self.in_parallel("forks answer", &names[1..], |name| self.grow(name))?);
        let of =
            |field: fn(&Grown) -> u64| Spread::of(&grown.iter().map(field).collect::<Vec<_>>());
        self.figures.fork_ready_us = of(|fork| fork.ready_us);
        self.figures.fork_reply_us = of(|fork| fork.reply_us);
        let ids: BTreeSet<&str> = grown.iter().map(|fork| fork.machine_id.as_str()).collect();
        let detail = format!("{} machine ids for {} forks", ids.len(), names.len());
        self.check("every fork has an identity of its own", ids.len() == names.len(), detail);
        Ok(names)
    }

    fn grow(&self, name: &str) -> Result<Grown> {
        let begun = Instant::now();
        let fork = self.fork(name, false)?;
        let machine = fork.machines.first().context("no fork was made")?;
        let machine_id = self.run(name, &["cat", "/etc/machine-id"])?;
        let reply_us = u64::try_from(begun.elapsed().as_micros())?;
        Ok(Grown { ready_us: machine.ready_us, reply_us, machine_id })
    }

    /// Does the same with every machine, on as many threads as there are
    /// CPUs, and says now and then how far it is.
    pub(super) fn in_parallel<T: Send>(
        &self,
        what: &str,
        names: &[String],
        work: impl Fn(&String) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let workers = std::thread::available_parallelism().map_or(2, usize::from).min(names.len());
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = work(name);
                        let failed = result.is_err();
                        let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                        results.push(result);
                        let done = results.len();
                        drop(results);
                        if done.is_multiple_of(names.len().div_ceil(5)) || done == names.len() {
                            self.say(&format!("{done} of {} {what}", names.len()));
                        }
                        if failed {
                            next.store(names.len(), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        results.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().collect()
    }

    /// What the forks cost, by the kernel's own accounting.
    pub(super) fn measure(&mut self, forks: &[String]) -> Result<()> {
        self.figures.host_available_after_bytes = crate::host_memory::available()?;
        let spent = self
            .figures
            .host_available_before_bytes
            .saturating_sub(self.figures.host_available_after_bytes);
        let count = u64::try_from(forks.len())?;
        self.figures.host_bytes_per_fork = spent / count;
        let lines = self.fork_lines(forks)?;
        let first = lines.first().context("the forks are not listed")?;
        self.figures.first_fork_store_pages = first.pages_installed;
        self.figures.first_fork_faults = first.faults;
        let rest = &lines[1..];
        let spread = |field: fn(&MachineLine) -> u64| {
            Spread::of(&rest.iter().map(field).collect::<Vec<u64>>())
        };
        self.figures.later_fork_store_pages = spread(|line| line.pages_installed);
        self.figures.later_fork_faults = spread(|line| line.faults);
        let mean = |field: fn(&MachineLine) -> u64| lines.iter().map(field).sum::<u64>() / count;
        self.figures.private_bytes_per_fork = mean(|line| line.private_bytes);
        self.figures.shared_bytes_per_fork = mean(|line| line.shared_bytes);
        self.figures.pss_bytes_per_fork = mean(|line| line.pss_bytes);
        self.figures.page_table_bytes_per_fork = mean(|line| line.page_table_bytes);
        let running = lines.iter().filter(|line| line.state == "running").count();
        let detail = format!(
            "{} private and {} shared each; {} of the host's memory each, all in",
            bytes(self.figures.private_bytes_per_fork),
            bytes(self.figures.shared_bytes_per_fork),
            bytes(self.figures.host_bytes_per_fork)
        );
        self.check("all forks run at the same time", running == forks.len(), detail);
        let detail = format!(
            "the first read {} pages, half of the later ones at most {}",
            self.figures.first_fork_store_pages, self.figures.later_fork_store_pages.p50
        );
        let shared = self.figures.later_fork_store_pages.p50 <= self.figures.first_fork_store_pages;
        self.check("later forks find pages that earlier ones fetched", shared, detail);
        Ok(())
    }

    fn fork_lines(&self, forks: &[String]) -> Result<Vec<MachineLine>> {
        let reply = self.client.call(Request::Machines)?;
        let Reply::Machines(lines) = reply else { return unexpected(&reply) };
        forks
            .iter()
            .map(|name| {
                let line = lines.iter().find(|line| line.name == *name);
                line.cloned().with_context(|| format!("{name} is not listed"))
            })
            .collect()
    }
}
