//! Commands about machines.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use super::store::{done, heading};
use crate::cli;
use crate::client::{Client, unexpected, with_file};
use crate::output::{Bar, Output, bytes, micros, table};
use crate::rpc::{Boot, Consistency, Fork, MachineLine, Reply, Request};

/// How often `logs --follow` looks for more.
const FOLLOW_TICK: Duration = Duration::from_millis(100);

pub(super) fn run(client: &Client, options: cli::Run, out: Output) -> Result<()> {
    let request = match (options.snapshot, &options.kernel) {
        (Some(source), _) => Request::Fork(Fork {
            source,
            count: 1,
            name: options.name,
            paused: options.paused,
            snapshot_only: true,
            nets: options.nets,
            prefetch: !options.no_prefetch,
        }),
        (None, _) => Request::Boot(Boot {
            name: options.name,
            disks: options.disks,
            memory_mib: options.memory,
            cpus: options.cpus,
            cmdline: options.cmdline,
            nets: options.nets,
        }),
    };
    check_kvm()?;
    let reply = match &options.kernel {
        Some(path) => {
            let kernel = File::open(path)
                .with_context(|| format!("cannot read the kernel {}", path.display()))?;
            client.ask(request, &with_file(&kernel), &mut |_| {})?.0
        }
        None => client.call(request)?,
    };
    forked(reply, out)
}

/// Says at once what would otherwise fail deep inside.
fn check_kvm() -> Result<()> {
    File::options().read(true).write(true).open("/dev/kvm").context(
        "cannot use /dev/kvm, which machines need: enable virtualization in the firmware or the hypervisor, load the kvm module, and run as root or as a member of the kvm group",
    )?;
    Ok(())
}

pub(super) fn fork(client: &Client, options: cli::Fork, out: Output) -> Result<()> {
    check_kvm()?;
    let request = Request::Fork(Fork {
        source: options.source,
        count: options.count,
        name: options.name,
        paused: options.paused,
        snapshot_only: false,
        nets: options.nets,
        prefetch: !options.no_prefetch,
    });
    let bar = Bar::new();
    let (reply, _) = client.ask(request, &[], &mut |step| bar.show(&step))?;
    drop(bar);
    forked(reply, out)
}

fn forked(reply: Reply, out: Output) -> Result<()> {
    let Reply::Forked(forked) = reply else { return unexpected(&reply) };
    out.print(&forked, || {
        let names: Vec<&str> = forked.machines.iter().map(|m| m.name.as_str()).collect();
        names.join("\n")
    })
}

pub(super) fn snapshot(client: &Client, request: Request, out: Output) -> Result<()> {
    let reply = client.call(request)?;
    let Reply::Captured(done) = reply else { return unexpected(&reply) };
    out.print(&done, || {
        format!(
            "{}: {} changed {}, {} stored, paused {}, {:.1} s in all",
            done.name.as_ref().unwrap_or(&done.id),
            done.dirty_pages,
            match done.consistency {
                Consistency::Whole => "pages",
                Consistency::Stopped => "blocks of the disks, as the guest has left them",
                Consistency::Flushed => "blocks of the disks, which the guest had flushed",
                Consistency::Crash => "blocks of the disks, as after a power cut",
            },
            bytes(done.stored_bytes),
            micros(done.pause_us),
            done.seconds
        )
    })
}

#[derive(Serialize)]
struct Machines {
    machines: Vec<MachineLine>,
}

pub(super) fn ps(client: &Client, out: Output) -> Result<()> {
    let reply = client.call(Request::Machines)?;
    let Reply::Machines(machines) = reply else { return unexpected(&reply) };
    let all = Machines { machines };
    out.print(&all, || {
        let mut rows =
            vec![heading(&["NAME", "STATE", "FROM", "MEMORY", "PRIVATE", "SHARED", "FAULTS"])];
        rows.extend(all.machines.iter().map(|line| {
            let state = match &line.reason {
                Some(reason) => format!("{} ({reason})", line.state),
                None => line.state.clone(),
            };
            vec![
                line.name.clone(),
                state,
                line.snapshot.clone().unwrap_or_default(),
                bytes(line.memory_bytes),
                bytes(line.private_bytes),
                bytes(line.shared_bytes),
                line.faults.to_string(),
            ]
        }));
        table(&rows)
    })
}

pub(super) fn pools(client: &Client, out: Output) -> Result<()> {
    let reply = client.call(Request::Pools)?;
    let Reply::Pools(pools) = reply else { return unexpected(&reply) };
    out.print(&pools, || {
        let mut rows = vec![heading(&["ROOT", "SIZE", "MACHINES", "RESIDENT", "READ"])];
        rows.extend(pools.pools.iter().map(|pool| {
            vec![
                pool.root.chars().take(12).collect(),
                bytes(pool.len),
                pool.machines.to_string(),
                bytes(pool.resident_pages * 4096),
                bytes(pool.bytes_read),
            ]
        }));
        table(&rows)
    })
}

pub(super) fn start(client: &Client, machine: String, out: Output) -> Result<()> {
    check_kvm()?;
    forked(client.call(Request::Start { machine })?, out)
}

pub(super) fn simple(client: &Client, request: Request, out: Output) -> Result<()> {
    done(client, request, out)
}

#[derive(Serialize)]
struct Stopped {
    stopped: Vec<String>,
}

pub(super) fn stop(client: &Client, machines: Vec<String>, kill: bool, out: Output) -> Result<()> {
    for machine in &machines {
        client.call(Request::Stop { machine: machine.clone(), kill })?;
    }
    let all = Stopped { stopped: machines };
    out.print(&all, || all.stopped.join("\n"))
}

#[derive(Serialize)]
struct Removed {
    removed: Vec<String>,
}

pub(super) fn rm(client: &Client, machines: Vec<String>, force: bool, out: Output) -> Result<()> {
    for machine in &machines {
        client.call(Request::RemoveMachine { machine: machine.clone(), force })?;
    }
    let all = Removed { removed: machines };
    out.print(&all, || all.removed.join("\n"))
}

pub(super) fn logs(client: &Client, machine: String, follow: bool) -> Result<()> {
    let request = Request::Logs { machine: machine.clone() };
    let (_, mut received) = client.ask(request, &[], &mut |_| {})?;
    let mut console = File::from(received.pop().context("the supervisor sent no log")?);
    let mut out = std::io::stdout().lock();
    loop {
        let ended = !follow || !is_alive(client, &machine)?;
        std::io::copy(&mut console, &mut out)?;
        out.flush()?;
        if ended {
            return Ok(());
        }
        std::thread::sleep(FOLLOW_TICK);
    }
}

fn is_alive(client: &Client, name: &str) -> Result<bool> {
    let reply = client.call(Request::Machines)?;
    let Reply::Machines(machines) = reply else { return unexpected(&reply) };
    Ok(machines.iter().any(|line| line.name == name && line.reason.is_none()))
}
