//! The supervisor: one process that owns a store, its page server and its
//! machines, and serves the command line over a unix socket.
//!
//! It is started by the first command that needs it and ends by itself when it
//! has had nothing to do for a while. Its end, however it comes, ends its
//! machines and its page server, because they see their channel close; the
//! store is safe at every instant.

mod agent;
mod boots;
mod budget;
mod bulk;
mod capture;
mod catalog;
mod clock;
mod cold;
mod collect;
mod config;
mod deadline;
mod freed;
mod freeze;
mod launch;
mod lineage;
mod machine;
mod machine_file;
mod machines;
mod memory_map;
mod net;
mod overlays;
pub(crate) mod paths;
mod piped;
mod pools;
mod read;
mod rest;
mod server;
mod table;
mod trunk;
mod usage;
pub(crate) mod view;
mod workers;
mod working_set;
mod working_sets;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use coppice_engine::{Settings, Store, StoreError};
use coppice_runtime::host::{News, Nursery, Pager, Program};
use coppice_runtime::protocol::{MachineKey, PagerEvent};
use crossbeam_channel::{Receiver, Sender, unbounded};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use budget::Budget;
pub(crate) use launch::{FORKS, MEMORY_MIB, VCPUS};
use machine::{Descent, Lineage, Machine, State, lock};
use paths::Paths;
use pools::Pools;
use table::Table;
use working_sets::WorkingSets;

/// A supervisor without machines ends after this long without a request.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// Processes that wait to become machines, so that a fork need not.
const WARM_PROCESSES: usize = 4;

/// How long to wait for a store that somebody else has open.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// The supervisor of one store.
#[derive(Debug)]
pub(crate) struct Supervisor {
    paths: Paths,
    store: Store,
    pager: Mutex<Option<Arc<Pager>>>,
    pools: Pools,
    budget: Budget,
    working_sets: WorkingSets,
    table: Table,
    keys: AtomicU64,
    /// Held while a snapshot is looked at and removed.
    removing: Mutex<()>,
    nursery: Nursery,
    pager_program: Program,
    /// Machines whose process has ended.
    news: Sender<Arc<Machine>>,
    /// Machines that need a page that nobody has.
    lost: Sender<MachineKey>,
    /// Why, for each of them.
    losses: Arc<Mutex<BTreeMap<MachineKey, String>>>,
    last_request: Mutex<Instant>,
    /// Set by a request to end, or by a signal.
    ending: Arc<AtomicBool>,
}

/// Serves until it is told to end, or nobody needs it.
pub(crate) fn serve(
    paths: Paths,
    background: bool,
    (zstd_level, pool_memory_mib): (i32, Option<u64>),
) -> Result<()> {
    coppice_runtime::sys::heap::share_arenas();
    // Keys typed for the command that started it are not meant for it.
    if background && rustix::process::setsid().is_err() {
        tracing::debug!("already the leader of a session");
    }
    // The store first: it refuses a folder that holds something else.
    let store = open_store(&paths, zstd_level)?;
    paths
        .create()
        .with_context(|| format!("cannot make folders in {}", paths.store().display()))?;
    log_to(&paths, background)?;
    let listener = listen(&paths)?;
    let (news, ended) = unbounded();
    let (lost, lost_keys) = unbounded();
    let budget = Budget::new(pool_memory_mib);
    let supervisor = Supervisor::new(paths, store, budget, (news, lost), ending_on_signals()?)?;
    let supervisor = Arc::new(supervisor);
    supervisor.find_ended()?;
    supervisor.leave_orphans();
    supervisor.watch(ended, lost_keys)?;
    supervisor.working_sets.keep_only(&supervisor.store);
    if !background {
        eprintln!("coppice: serving {}", supervisor.paths.store().display());
    }
    tracing::info!(store = %supervisor.paths.store().display(), "serving");
    server::accept(&supervisor, &listener, background)
}

/// Opens the store. A supervisor that is just ending still has it for a
/// moment after its socket is gone.
fn open_store(paths: &Paths, zstd_level: i32) -> Result<Store> {
    let begun = Instant::now();
    let settings = Settings { zstd_level, ..Settings::default() };
    loop {
        match Store::open(paths.store(), &settings) {
            Err(StoreError::Locked) if begun.elapsed() < LOCK_LIMIT => {
                std::thread::sleep(Duration::from_millis(20));
            }
            opened => return Ok(opened?),
        }
    }
}

/// A flag that is set when this process is asked to end.
fn ending_on_signals() -> Result<Arc<AtomicBool>> {
    let ending = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&ending))
            .context("cannot listen for signals")?;
    }
    Ok(ending)
}

/// Standard error is kept for why a supervisor could not start.
fn log_to(paths: &Paths, background: bool) -> Result<()> {
    let path = paths.supervisor_log();
    let log = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    if background {
        // From here on a panic is told there too.
        rustix::stdio::dup2_stderr(&log)?;
    }
    tracing_subscriber::fmt()
        .with_env_filter(crate::commands::log_filter())
        .with_writer(Mutex::new(log))
        .with_ansi(false)
        .init();
    Ok(())
}

/// Binds the socket. The store's lock is held, so a socket that is there
/// belongs to nobody.
fn listen(paths: &Paths) -> Result<UnixListener> {
    let socket = paths.socket();
    if let Err(error) = std::fs::remove_file(&socket)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("cannot replace {}", socket.display()));
    }
    UnixListener::bind(&socket).with_context(|| format!("cannot listen on {}", socket.display()))
}

fn internal_program(command: &str) -> Result<Program> {
    let path = std::env::current_exe().context("cannot find the coppice program itself")?;
    Ok(Program { path, arguments: vec![OsString::from(command)] })
}

/// This very program, also when its file was replaced since: the page server
/// that takes over must speak as the one that ended did.
fn same_program(command: &str) -> Program {
    Program { path: "/proc/self/exe".into(), arguments: vec![OsString::from(command)] }
}

impl Supervisor {
    fn new(
        paths: Paths,
        store: Store,
        budget: Budget,
        (news, lost): (Sender<Arc<Machine>>, Sender<MachineKey>),
        ending: Arc<AtomicBool>,
    ) -> Result<Self> {
        Ok(Self {
            nursery: Nursery::new(
                internal_program("internal-zygote")?,
                paths.zygote_log(),
                WARM_PROCESSES,
            )?,
            budget,
            working_sets: WorkingSets::new(paths.working_sets()),
            pager_program: same_program("internal-pager"),
            paths,
            store,
            pager: Mutex::new(None),
            pools: Pools::default(),
            table: Table::default(),
            keys: AtomicU64::new(1),
            removing: Mutex::new(()),
            news,
            lost,
            losses: Arc::default(),
            last_request: Mutex::new(Instant::now()),
            ending,
        })
    }

    /// The page server, started when it is first needed.
    fn pager(&self) -> Result<Arc<Pager>> {
        let mut slot = lock(&self.pager);
        if let Some(pager) = &*slot {
            return Ok(Arc::clone(pager));
        }
        let log = File::create(self.paths.pager_log())
            .with_context(|| format!("cannot write {}", self.paths.pager_log().display()))?;
        let lost = self.lost.clone();
        let losses = Arc::clone(&self.losses);
        let pager = Pager::spawn(&self.pager_program, &log, move |news| {
            let (key, why) = match news {
                News::Event(PagerEvent::PageLost { machine, error, .. }) => (machine, error),
                // The handle of the page server keeps these.
                News::Event(PagerEvent::LayerDone { .. }) => return,
                // No other one follows, and without it no machine can go on.
                News::Closed => (EVERY_MACHINE, GIVEN_UP.to_owned()),
            };
            // Before any later reply of the page server is seen: whoever asks
            // it after a machine's end finds the reason here.
            lock(&losses).entry(key).or_insert(why);
            // Nobody listens only when the supervisor is ending.
            let _heard = lost.send(key).is_ok();
        })?;
        self.budget.tell(&pager)?;
        Ok(Arc::clone(slot.insert(Arc::new(pager))))
    }

    /// The page server, if one runs.
    fn running_pager(&self) -> Option<Arc<Pager>> {
        lock(&self.pager).clone()
    }

    fn next_key(&self) -> u64 {
        self.keys.fetch_add(1, Ordering::Relaxed)
    }

    /// Starts the threads that act on what machines and page server report.
    fn watch(
        self: &Arc<Self>,
        ended: Receiver<Arc<Machine>>,
        lost: Receiver<MachineKey>,
    ) -> Result<()> {
        let me = Arc::clone(self);
        spawn("reaper", move || {
            for machine in ended {
                me.release(&machine);
            }
        })?;
        let me = Arc::clone(self);
        spawn("memory", move || me.follow_memory())?;
        let me = Arc::clone(self);
        spawn("working-sets", move || {
            loop {
                std::thread::sleep(working_sets::TICK);
                me.working_sets.collect_due(me.running_pager().as_deref());
            }
        })?;
        let me = Arc::clone(self);
        spawn("losses", move || {
            for key in lost {
                me.fail(key);
            }
        })
    }

    /// Stops the machines that cannot go on.
    fn fail(&self, key: MachineKey) {
        let mut why = lock(&self.losses).get(&key).cloned().unwrap_or_default();
        if key == EVERY_MACHINE {
            // Before there is another one, which begins its log anew.
            why.push_str(&self.end_of_pager());
            tracing::error!(why);
            *lock(&self.pager) = None;
            lock(&self.losses).remove(&key);
        }
        for machine in self.table.list() {
            if (machine.key == key || key == EVERY_MACHINE) && machine.state().is_alive() {
                tracing::error!(machine = machine.name, why, "stopped");
                machine.ended(State::Failed(why.clone()));
                self.release(&machine);
            }
        }
    }

    /// What is known about the last end of a page server that did not say why.
    fn end_of_pager(&self) -> String {
        let status = self.running_pager().and_then(|pager| pager.exit_status());
        let how = status.map_or("it cannot be started".to_owned(), |status| status.to_string());
        match last_line(&self.paths.pager_log()) {
            Some(line) => format!(" ({how}): {line}"),
            None => format!(" ({how})"),
        }
    }

    /// Lets go of everything a machine's process held, once nobody has to copy
    /// from it. The process is killed if it is still there, even if it waits
    /// for a page that never comes.
    fn release(&self, machine: &Machine) {
        let _releasing = lock(&machine.releasing);
        let Some(live) = lock(&machine.live).take() else {
            // Whoever let it go may have left the last user of a layer to us.
            return self.pools.close_layers();
        };
        machine.finish_layers();
        self.keep_disks(machine, &live);
        live.vmm.kill();
        self.working_sets.collect(machine.key, self.running_pager().as_deref());
        // No other capture will build on them.
        *lock(&machine.descent) = Descent::Stored(Lineage::ended());
        match self.running_pager().map(|pager| pager.detach(machine.key)) {
            Some(Ok(faults)) => *lock(&machine.last_faults) = Some(faults),
            Some(Err(error)) => tracing::warn!(machine = machine.name, %error, "detach"),
            None => {}
        }
        drop(live);
        self.pools.close_layers();
        if let Some(why) = lock(&self.losses).remove(&machine.key) {
            machine.lost(why);
        }
        self.record_end(machine);
    }

    /// Keeps what is known of a machine that ended.
    fn record_end(&self, machine: &Machine) {
        if !machine.folder.exists() {
            return;
        }
        match machine_file::write(machine) {
            Ok(()) if lock(&machine.rest).is_some() => {
                let before = lock(&machine.came_from).take();
                self.leave(before, machine);
            }
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(machine = machine.name, %error, "cannot record its end");
            }
        }
    }
}

/// Why no machine can go on.
const GIVEN_UP: &str = "the page server ended again and again and was given up";

/// Stands for all machines in a report of loss; no machine has this key.
const EVERY_MACHINE: MachineKey = MachineKey(u64::MAX);

/// The last line of a log that says anything.
fn last_line(log: &Path) -> Option<String> {
    let text = std::fs::read_to_string(log).ok()?;
    text.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .with_context(|| format!("cannot start the {name} thread"))?;
    Ok(())
}
