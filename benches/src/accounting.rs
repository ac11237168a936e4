//! Memory by the kernel's own accounting, in KiB.

use std::fs;
use std::ops::Sub;

use anyhow::{Context, Result};

/// The host, from `/proc/meminfo`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Host {
    /// All that is neither free nor a cache of files on disk.
    pub used_kib: i64,
    /// Shared memory, pools among it.
    pub shmem_kib: i64,
    /// Page tables of processes.
    pub page_tables_kib: i64,
    /// Page tables of hypervisors (`SecPageTables`).
    pub kvm_page_tables_kib: i64,
    /// The kernel's small objects.
    pub slab_kib: i64,
    /// Stacks that threads have in the kernel.
    pub kernel_stacks_kib: i64,
    /// What the kernel maps piece by piece: tables of KVM, filters.
    pub vmalloc_kib: i64,
    /// What the kernel has once for each CPU.
    pub percpu_kib: i64,
}

impl Host {
    /// Asks the kernel.
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
        let field = |name| field_kib(&text, name).unwrap_or(0);
        let file_cache = field("Buffers:") + field("Cached:") - field("Shmem:");
        Ok(Self {
            used_kib: field("MemTotal:") - field("MemFree:") - file_cache,
            shmem_kib: field("Shmem:"),
            page_tables_kib: field("PageTables:"),
            kvm_page_tables_kib: field("SecPageTables:"),
            slab_kib: field("Slab:"),
            kernel_stacks_kib: field("KernelStack:"),
            vmalloc_kib: field("VmallocUsed:"),
            percpu_kib: field("Percpu:"),
        })
    }
}

impl Sub for Host {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            used_kib: self.used_kib - before.used_kib,
            shmem_kib: self.shmem_kib - before.shmem_kib,
            page_tables_kib: self.page_tables_kib - before.page_tables_kib,
            kvm_page_tables_kib: self.kvm_page_tables_kib - before.kvm_page_tables_kib,
            slab_kib: self.slab_kib - before.slab_kib,
            kernel_stacks_kib: self.kernel_stacks_kib - before.kernel_stacks_kib,
            vmalloc_kib: self.vmalloc_kib - before.vmalloc_kib,
            percpu_kib: self.percpu_kib - before.percpu_kib,
        }
    }
}

/// What the control group of this process has charged for memory, caches of
/// files left out: on a busy host the only account that is one's own. `None`
/// if there is no such group.
pub fn group_kib() -> Option<i64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let first = groups.lines().find_map(|line| line.split_once(":memory:"));
    let (folder, usage, cache) = match first {
        Some((_, path)) => {
            (format!("/sys/fs/cgroup/memory{path}"), "memory.usage_in_bytes", "total_cache ")
        }
        None => {
            let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
            (format!("/sys/fs/cgroup{path}"), "memory.current", "file ")
        }
    };
    let usage: i64 = fs::read_to_string(format!("{folder}/{usage}")).ok()?.trim().parse().ok()?;
    let stat = fs::read_to_string(format!("{folder}/memory.stat")).ok()?;
    let cache = stat.lines().find_map(|line| line.strip_prefix(cache))?;
    Some((usage - cache.trim().parse::<i64>().ok()?) / 1024)
}

/// What only this process has, guest and page tables included, in KiB.
pub fn private_kib(pid: u32) -> Result<(i64, i64)> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("smaps_rollup")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("status")?;
    let private = field_kib(&rollup, "Private_Clean:").context("Private_Clean")?
        + field_kib(&rollup, "Private_Dirty:").context("Private_Dirty")?;
    Ok((private, field_kib(&status, "VmPTE:").context("VmPTE")?))
}

/// A process, from its `smaps` and `status`, without the guest's memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Process {
    /// Pages that only this process has: stacks, heap, data.
    pub private_kib: i64,
    /// Its part of what it shares: the program and its libraries.
    pub shared_part_kib: i64,
    /// Page tables, those of the guest's memory included.
    pub page_tables_kib: i64,
    /// Its part of the guest's memory, shared pages divided by their users.
    pub guest_pss_kib: i64,
}

impl Process {
    /// Asks the kernel. The guest's memory is the mapping at this address.
    pub fn of(pid: u32, guest_address: u64) -> Result<Self> {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("smaps")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("status")?;
        let mut process = Self {
            page_tables_kib: field_kib(&status, "VmPTE:").context("VmPTE")?,
            ..Self::default()
        };
        let guest = format!("{guest_address:x}-");
        let mut in_guest = false;
        for line in smaps.lines() {
            let is_header = line.split(' ').next().is_some_and(|word| !word.ends_with(':'));
            if is_header {
                in_guest = line.starts_with(&guest);
            } else if in_guest {
                process.guest_pss_kib += field_kib(line, "Pss:").unwrap_or(0);
            } else {
                let private = field_kib(line, "Private_Clean:").unwrap_or(0)
                    + field_kib(line, "Private_Dirty:").unwrap_or(0);
                process.private_kib += private;
                process.shared_part_kib += field_kib(line, "Pss:").unwrap_or(0) - private;
            }
        }
        Ok(process)
    }
}

/// The number behind a name at the start of a line.
fn field_kib(text: &str, name: &str) -> Option<i64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_at_the_start_of_a_line() {
        let text = "MemTotal:       24 kB\nSwapCached:  3 kB\nCached:  7 kB\n";
        assert_eq!(field_kib(text, "Cached:"), Some(7));
        assert_eq!(field_kib(text, "Shmem:"), None);
    }

    #[test]
    fn this_process_has_page_tables_and_memory() {
        let process = Process::of(std::process::id(), 1).unwrap();
        assert!(process.page_tables_kib > 0 && process.private_kib > 0);
        assert_eq!(process.guest_pss_kib, 0);
        assert!(Host::now().unwrap().used_kib > 0);
    }
}
