//! The life of machines after they are made: listing, pausing, stopping,
//! removing.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coppice_runtime::protocol::MachineFaults;

use super::capture::alive;
use super::machine::{Live, Machine, State, lock};
use super::net::Net;
use super::workers::at_once;
use super::{Supervisor, net, usage};
use crate::rpc::{Forked, MachineLine, NetLine, PoolLine, Pools, Reply};

/// How long a machine may take to stop its vCPUs.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);

/// How long a guest may take to shut down before it is ended anyway.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Machines that are ended at the same time: the kernel takes its time to take
/// one down.
const ENDED_AT_ONCE: usize = 16;

impl Supervisor {
    /// What `ps` shows.
    pub(crate) fn machine_lines(&self) -> Result<Vec<MachineLine>> {
        // A page server that is just ending has no counters any more.
        let stats = self.running_pager().and_then(|pager| pager.stats().ok());
        let attached = stats.map(|(_, machines)| machines).unwrap_or_default();
        let attached: BTreeMap<_, _> = attached.into_iter().collect();
        let faults_of = |machine: &Machine| {
            let live = attached.get(&machine.key).copied();
            live.or(*lock(&machine.last_faults)).unwrap_or_default()
        };
        Ok(self.table.list().iter().map(|machine| line(machine, faults_of(machine))).collect())
    }

    /// What `pools` shows.
    pub(crate) fn pool_lines(&self) -> Result<Pools> {
        let Some(pager) = self.running_pager() else {
            let budget_bytes = self.budget.bytes();
            let (pools, resident_bytes) = (Vec::new(), 0);
            return Ok(Pools { pid: 0, takeovers: 0, budget_bytes, resident_bytes, pools });
        };
        let counters = pager.stats()?.0;
        let pools = self
            .pools
            .list()
            .into_iter()
            .filter_map(|(pool, machines)| {
                let stats = counters.iter().find(|(id, _)| *id == pool.id)?.1;
                Some(PoolLine {
                    root: match &pool.image {
                        Some(image) => image.root.to_string(),
                        None => format!("live-layer-{}", pool.id.0),
                    },
                    len: stats.len,
                    machines,
                    resident_pages: stats.resident_pages,
                    stored_pages: stats.stored_pages,
                    zero_pages: stats.zero_pages,
                    frames_read: stats.frames_read,
                    bytes_read: stats.bytes_read,
                    frames_prefetched: stats.frames_prefetched,
                    evicted_pages: stats.evicted_pages,
                })
            })
            .collect();
        let resident_bytes = counters.iter().map(|(_, stats)| stats.resident_pages * 4096).sum();
        let (pid, takeovers) = (pager.pid(), pager.takeovers());
        Ok(Pools { pid, takeovers, budget_bytes: self.budget.bytes(), resident_bytes, pools })
    }

    /// Opens a stream to a port in the guest.
    pub(crate) fn connect(&self, name: &str, port: u32) -> Result<UnixStream> {
        let machine = self.table.get(name)?;
        super::agent::renew(&machine)?;
        Ok(alive(&machine)?.vmm.connect(port)?)
    }

    /// The console log of a machine, also of one that has ended.
    pub(crate) fn console(&self, name: &str) -> Result<File> {
        let path = self.table.get(name)?.folder.join("console.log");
        File::open(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// Pauses a machine: off the host, or in its place.
    pub(crate) fn pause(&self, name: &str, in_memory: bool) -> Result<Reply> {
        if in_memory {
            return self.pause_in_memory(name);
        }
        self.suspend(&*self.table.get(name)?)?;
        Ok(Reply::Done)
    }

    /// Stops a machine's vCPUs; its memory stays on the host.
    fn pause_in_memory(&self, name: &str) -> Result<Reply> {
        let machine = self.table.get(name)?;
        let _turn = lock(&machine.turn);
        let live = alive(&machine)?;
        if machine.state() == State::Running {
            live.vmm.pause(PAUSE_LIMIT)?;
            machine.now(State::Paused);
        }
        Ok(Reply::Done)
    }

    /// Lets a paused machine go on, with the clock put right before its next
    /// command.
    pub(crate) fn resume(&self, name: &str) -> Result<Reply> {
        let machine = self.table.get(name)?;
        match machine.state() {
            State::Suspended => {
                self.come_back(&machine)?;
                return Ok(Reply::Done);
            }
            State::Failed(_) if machine.left().is_some() => {
                self.come_back(&machine)?;
                return Ok(Reply::Done);
            }
            State::Stopped(_) if machine.left().is_some() => {
                bail!("{name} was shut down: `coppice start {name}` boots it again");
            }
            _ => {}
        }
        let _turn = lock(&machine.turn);
        let live = alive(&machine)?;
        if machine.state() == State::Paused {
            machine.identity.wanted.store(super::agent::generation()?, Ordering::Release);
            live.vmm.resume()?;
            machine.now(State::Running);
            super::agent::plug_when_renewed(&machine, &live)?;
        }
        Ok(Reply::Done)
    }

    /// Boots a machine that was shut down from its own disks.
    pub(crate) fn start_again(&self, name: &str) -> Result<Forked> {
        let machine = self.table.get(name)?;
        match machine.state() {
            State::Suspended => bail!("{name} is suspended: `coppice resume {name}` lets it go on"),
            State::Paused => bail!("{name} is paused: `coppice resume {name}` lets it go on"),
            _ => {}
        }
        let ready = self.come_back(&machine)?;
        let all_ready_us = ready.ready_us;
        Ok(Forked { machines: vec![ready], parent_pause_us: 0, all_ready_us })
    }

    /// Shuts the guest down, or ends it without asking.
    pub(crate) fn stop(&self, name: &str, kill: bool) -> Result<Reply> {
        let machine = self.table.get(name)?;
        if kill {
            end_now(&machine, "it was stopped");
        }
        let _turn = lock(&machine.turn);
        if machine.state() == State::Suspended {
            bail!(
                "{name} is suspended: `coppice resume {name}` first, or remove it with `coppice rm --force {name}`"
            );
        }
        if !machine.state().is_alive() {
            self.release(&machine);
            return Ok(Reply::Done);
        }
        let live = alive(&machine)?;
        let asked =
            machine.state() == State::Running && self.shut_down(&machine, &live, STOP_LIMIT);
        let how = if asked { "it was shut down" } else { "it was stopped" };
        machine.ended(State::Stopped(how.to_owned()));
        drop(live);
        self.release(&machine);
        Ok(Reply::Done)
    }

    /// Forgets a machine and removes its folder.
    pub(crate) fn remove_machine(&self, name: &str, force: bool) -> Result<Reply> {
        let machine = self.table.get(name)?;
        let lasts = machine.state().is_alive() || machine.state() == State::Suspended;
        if lasts && !force {
            bail!("{name} is {}: stop it first, or use --force", machine.state().word());
        }
        self.remove_this(&machine)?;
        Ok(Reply::Done)
    }

    /// Removes this very machine, whatever it does.
    pub(super) fn remove_this(&self, machine: &Arc<Machine>) -> Result<()> {
        end_now(machine, "it was removed");
        let _turn = lock(&machine.turn);
        if !self.table.holds(machine) {
            // Somebody else removed it; the name may be another machine's.
            return Ok(());
        }
        self.release(machine);
        match std::fs::remove_dir_all(&machine.folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("cannot remove {}", machine.folder.display()));
            }
            _ => self.table.remove_machine(machine),
        }
        let left = [lock(&machine.rest).take(), lock(&machine.came_from).take()];
        left.into_iter().for_each(|id| self.leave(id, machine));
        Ok(())
    }

    /// Ends every machine; the supervisor is about to end.
    pub(crate) fn end_all(&self) {
        let alive = self.table.list().into_iter().filter(|machine| machine.state().is_alive());
        let end = |machine: Arc<Machine>| {
            machine.discarded.store(true, Ordering::Release);
            machine.ended(State::Stopped("its supervisor was ended".to_owned()));
            self.release(&machine);
            Ok(())
        };
        if let Err(error) = at_once(alive, ENDED_AT_ONCE, end, drop) {
            // What is left sees its channel close.
            tracing::warn!(%error, "not all machines were ended one by one");
        }
    }
}

/// Kills a machine's process without waiting for whoever works with it.
fn end_now(machine: &Arc<Machine>, why: &str) {
    machine.discarded.store(true, Ordering::Release);
    machine.ended(State::Stopped(why.to_owned()));
    machine.finish_layers();
    if let Some(live) = machine.live() {
        live.vmm.kill();
    }
}

fn net_lines(live: &Live) -> Vec<NetLine> {
    let line = |net: &Net| NetLine { tap: net.tap.name().to_owned(), mac: net::spell(net.mac) };
    live.nets.iter().map(line).collect()
}

fn line(machine: &Machine, faults: MachineFaults) -> MachineLine {
    let state = machine.state();
    let live = machine.live();
    let usage = live.as_deref().map(usage::measure);
    // A machine that ends while it is measured costs nothing any more.
    let usage = usage.and_then(Result::ok).unwrap_or_default();
    MachineLine {
        name: machine.name.clone(),
        state: state.word().to_owned(),
        reason: state.reason().map(str::to_owned),
        snapshot: machine.source.clone(),
        pid: live.as_deref().map(|live| live.vmm.pid()),
        vcpus: machine.config.vcpus,
        memory_bytes: machine.config.memory_bytes,
        private_bytes: usage.private_bytes,
        shared_bytes: usage.shared_bytes,
        pss_bytes: usage.pss_bytes,
        page_table_bytes: usage.page_table_bytes,
        vmm_bytes: usage.vmm_bytes,
        overlay_bytes: usage.overlay_bytes,
        faults: faults.faults,
        store_faults: faults.store_faults,
        pages_installed: faults.pages_installed,
        nets: live.as_deref().map_or_else(Vec::new, net_lines),
    }
}
