//! The checks, each a function that changes nothing.

use std::fs::File;
use std::path::Path;

use coppice_runtime::sys::userfault::Userfault;
use rustix::process::{Resource, geteuid, getrlimit};

use super::Check;
use crate::output::bytes;

/// The first with `PAGEMAP_SCAN`, by which dirty pages are found.
const KERNEL_MIN: (u32, u32) = (6, 7);
/// A machine takes about so many mappings, descriptors and bytes of memory.
const MAPPINGS_PER_MACHINE: u64 = 600;
const DESCRIPTORS_WANTED: u64 = 65_536;
const THREADS_WANTED: u64 = 65_536;
const FREE_WANTED: u64 = 5 << 30;

/// Runs all checks; `store` is where the store is or would be.
pub(super) fn examine(store: &Path) -> Vec<Check> {
    vec![
        kernel(),
        kvm(),
        userfault(),
        poison(),
        huge_pages(),
        jail(),
        io_uring(),
        tap(),
        descriptors(),
        threads(),
        mappings(),
        memory(),
        disk(store),
    ]
}

fn kernel() -> Check {
    let name = "kernel";
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => return Check::warn(name, release, "this release has no version that is known here"),
    };
    if version >= KERNEL_MIN {
        Check::ok(name, format!("Linux {release}"))
    } else {
        Check::fail(
            name,
            format!("Linux {release}"),
            "captures need Linux 6.7 or later, which can list the pages that a machine wrote (the store works with any)",
        )
    }
}

fn kvm() -> Check {
    let name = "/dev/kvm";
    match File::options().read(true).write(true).open(name) {
        Ok(_) => Check::ok(name, "can be used"),
        Err(error) => Check::fail(
            name,
            error.to_string(),
            "enable virtualization in the firmware or the hypervisor, load the kvm module (modprobe kvm_intel or kvm_amd), and run as root or as a member of the kvm group",
        ),
    }
}

fn userfault() -> Check {
    let name = "userfaultfd";
    match Userfault::new() {
        Ok(_) => Check::ok(name, "takes faults of the kernel and of shared memory"),
        Err(error) => Check::fail(
            name,
            error.to_string(),
            "run as root, or give the user the right to open /dev/userfaultfd: chown it, or a udev rule",
        ),
    }
}

fn poison() -> Check {
    let name = "page poisoning";
    if Userfault::can_poison() {
        Check::ok(name, "a page that is lost stops only the machine that needs it")
    } else {
        Check::warn(
            name,
            "not there",
            "Linux 6.6 or later can stop just the machine that needs a lost page",
        )
    }
}

fn huge_pages() -> Check {
    let name = "shared huge pages";
    match coppice_runtime::check_huge_pages() {
        Ok(()) => Check::ok(name, "never unasked"),
        Err(error) => Check::fail(
            name,
            error.to_string(),
            "echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled, and likewise in each hugepages-* folder there",
        ),
    }
}

/// Who is not root needs a user namespace to see nothing of the host.
fn jail() -> Check {
    let name = "jail";
    if geteuid().is_root() {
        return Check::ok(name, "root: each machine gets a user id and empty namespaces");
    }
    let read = |path: &str| number(&std::fs::read_to_string(path).unwrap_or_default());
    let forbidden = read("/proc/sys/kernel/unprivileged_userns_clone") == Some(0)
        || read("/proc/sys/user/max_user_namespaces") == Some(0)
        || read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1);
    if forbidden {
        Check::warn(
            name,
            "this user may make no namespaces",
            "machines are held by their system call filter alone; run as root, or allow unprivileged user namespaces",
        )
    } else {
        Check::ok(name, "machines get empty namespaces, but share this user's id")
    }
}

fn io_uring() -> Check {
    let name = "io_uring";
    let setting = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    match setting.as_deref().map(str::trim) {
        Ok("0") => Check::ok(name, "can be used"),
        Ok("1") if geteuid().is_root() => Check::ok(name, "can be used"),
        Ok(_) => Check::warn(
            name,
            "forbidden",
            "the store reads by pread instead, which is slower: sysctl kernel.io_uring_disabled=0",
        ),
        Err(_) => Check::ok(name, "this kernel has no switch for it"),
    }
}

fn tap() -> Check {
    let name = "/dev/net/tun";
    match File::options().read(true).write(true).open(name) {
        Ok(_) => Check::ok(name, "can be opened"),
        Err(error) => {
            Check::warn(name, error.to_string(), "machines can have no network: modprobe tun")
        }
    }
}

fn descriptors() -> Check {
    let name = "open files";
    let limit = getrlimit(Resource::Nofile).maximum;
    match limit {
        Some(limit) if limit < DESCRIPTORS_WANTED => Check::warn(
            name,
            format!("at most {limit}"),
            "a machine takes about ten descriptors: raise the hard limit of open files (LimitNOFILE, ulimit -Hn) for thousands",
        ),
        Some(limit) => Check::ok(name, format!("at most {limit}")),
        None => Check::ok(name, "no limit"),
    }
}

fn threads() -> Check {
    let name = "kernel.pid_max";
    let text = std::fs::read_to_string("/proc/sys/kernel/pid_max").unwrap_or_default();
    match number(&text) {
        Some(most) if most < THREADS_WANTED => Check::warn(
            name,
            most.to_string(),
            "a machine takes about six threads: sysctl kernel.pid_max=4194304 for thousands",
        ),
        Some(most) => Check::ok(name, most.to_string()),
        None => Check::warn(name, "unknown", "/proc is not there"),
    }
}

fn mappings() -> Check {
    let name = "vm.max_map_count";
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    match number(&text) {
        Some(count) if count < MAPPINGS_PER_MACHINE => Check::fail(
            name,
            count.to_string(),
            "a machine's memory may consist of 512 mappings: sysctl vm.max_map_count=65530",
        ),
        Some(count) => Check::ok(name, count.to_string()),
        None => Check::warn(name, "unknown", "/proc is not there"),
    }
}

fn memory() -> Check {
    let name = "memory";
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |field: &str| {
        let line = text.lines().find(|line| line.starts_with(field))?;
        number(line.get(field.len()..)?)
    };
    match (kib("MemAvailable:"), kib("MemTotal:")) {
        (Some(available), Some(total)) => {
            let detail = format!("{} of {} available", bytes(available << 10), bytes(total << 10));
            if available < 1 << 20 {
                Check::warn(
                    name,
                    detail,
                    "pools and private pages of machines need more than 1 GiB",
                )
            } else {
                Check::ok(name, detail)
            }
        }
        _ => Check::warn(name, "unknown", "/proc is not there"),
    }
}

fn disk(store: &Path) -> Check {
    let name = "disk";
    // The store may not exist yet: what counts is where it would be.
    let place = store.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(place) {
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let detail = format!("{} free for {}", bytes(free), store.display());
            if free < FREE_WANTED {
                Check::warn(
                    name,
                    detail,
                    "less than 5 GiB: `coppice gc` gives back what was removed",
                )
            } else {
                Check::ok(name, detail)
            }
        }
        Err(errno) => Check::warn(name, format!("{}: {errno}", place.display()), "unknown"),
    }
}

/// The first number in a text.
fn number(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_says_something_and_what_to_do() {
        let checks = examine(Path::new("/no/such/store"));
        assert!(checks.len() >= 10);
        for check in checks {
            assert!(!check.detail.is_empty(), "{check:?}");
            assert_eq!(check.fix.is_none(), check.state == super::super::State::Ok, "{check:?}");
        }
    }
}
