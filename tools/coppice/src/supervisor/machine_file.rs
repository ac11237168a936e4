//! `machine.json`: what a later supervisor needs of a machine whose supervisor
//! ended: to bring it back, if the store has all of it, else so that its logs
//! can be read and its folder removed.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use coppice_engine::SnapshotId;
use coppice_runtime::protocol::{MachineConfig, MachineKey};
use serde::{Deserialize, Serialize};

use super::Supervisor;
use super::boots::Boots;
use super::config::Recorded;
use super::machine::{Descent, Identity, Lineage, Machine, State, lock};
use crate::cable::Cable;

const FILE: &str = "machine.json";

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    name: String,
    source: Option<String>,
    memory_bytes: u64,
    vcpus: u32,
    ended: Option<String>,
    failed: bool,
    /// The snapshot that it is without a process.
    #[serde(default)]
    rest: Option<String>,
    /// The snapshot that it came back from.
    #[serde(default)]
    came_from: Option<String>,
    #[serde(default)]
    machine_id: String,
    #[serde(default)]
    nets: Vec<(Cable, [u8; 6])>,
}

impl Saved {
    /// Of a machine whose file says nothing: its name stays taken, so that
    /// nothing is written over what its folder has.
    fn unreadable(folder: &Path, error: &anyhow::Error) -> Result<Self> {
        let name = folder.file_name().and_then(|name| name.to_str());
        Ok(Self {
            name: name.context("a machine's folder has no name")?.to_owned(),
            source: None,
            memory_bytes: 0,
            vcpus: 0,
            ended: Some(format!("{} cannot be read: {error}", folder.join(FILE).display())),
            failed: true,
            rest: None,
            came_from: None,
            machine_id: String::new(),
            nets: Vec::new(),
        })
    }
}

/// Writes or replaces a machine's file. It is durable if it is what brings the
/// machine back.
pub(crate) fn write(machine: &Machine) -> Result<()> {
    let state = machine.state();
    let ended = state.reason().map(str::to_owned);
    let (rest, came_from) = (*lock(&machine.rest), *lock(&machine.came_from));
    let saved = Saved {
        name: machine.name.clone(),
        source: machine.source.clone(),
        memory_bytes: machine.config.memory_bytes,
        vcpus: machine.config.vcpus,
        ended,
        failed: matches!(state, State::Failed(_)),
        rest: rest.map(|id| id.to_string()),
        came_from: came_from.map(|id| id.to_string()),
        machine_id: machine.identity.machine_id.clone(),
        nets: machine.nets.iter().cloned().zip(machine.macs.iter().copied()).collect(),
    };
    let durable = rest.or(came_from).is_some();
    replace(&machine.folder, &serde_json::to_vec(&saved)?, durable)
        .with_context(|| format!("cannot write {}", machine.folder.join(FILE).display()))
}

fn replace(folder: &Path, bytes: &[u8], durable: bool) -> std::io::Result<()> {
    let partial = folder.join("machine.json.tmp");
    let mut file = File::create(&partial)?;
    file.write_all(bytes)?;
    if durable {
        file.sync_all()?;
    }
    std::fs::rename(&partial, folder.join(FILE))?;
    if durable {
        File::open(folder)?.sync_all()?;
        // Also the name of the folder itself.
        if let Some(all) = folder.parent() {
            File::open(all)?.sync_all()?;
        }
    }
    Ok(())
}

impl Supervisor {
    /// Lists the machines that an earlier supervisor left behind: off the host,
    /// or ended.
    pub(crate) fn find_ended(&self) -> Result<()> {
        for folder in std::fs::read_dir(self.paths.machines())? {
            let folder = folder?.path();
            if !folder.is_dir() {
                continue;
            }
            let saved = match std::fs::read(folder.join(FILE)) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    // It was being made when its supervisor ended: nobody knows it.
                    std::fs::remove_dir_all(&folder)
                        .with_context(|| format!("cannot remove {}", folder.display()))?;
                    continue;
                }
                read => read.map_err(anyhow::Error::from),
            };
            let saved = saved.and_then(|bytes| Ok(serde_json::from_slice::<Saved>(&bytes)?));
            let saved = saved.or_else(|error| Saved::unreadable(&folder, &error));
            self.table.restore(self.found(folder, saved?));
        }
        Ok(())
    }

    fn found(&self, folder: PathBuf, saved: Saved) -> Machine {
        let rest = saved.rest.as_deref().map(|id| self.recorded_rest(id));
        // Where it is gone the machine has nothing to fall back to.
        let came_from = saved.came_from.and_then(|id| self.recorded_rest(&id).ok());
        let came_from_id = came_from.as_ref().map(|(id, _)| *id);
        let state = match (saved.ended, &rest) {
            (_, Some(Err(error))) => State::Failed(format!("what it was is not there: {error}")),
            (Some(reason), _) if saved.failed => State::Failed(reason),
            (Some(reason), _) => State::Stopped(reason),
            (None, Some(Ok(_))) => State::Suspended,
            (None, None) => State::Failed("its supervisor ended while it ran".to_owned()),
        };
        let plain = MachineConfig {
            memory_bytes: saved.memory_bytes,
            vcpus: saved.vcpus,
            disks: Vec::new(),
        };
        let rest = rest.and_then(Result::ok);
        let rest_id = rest.as_ref().map(|(id, _)| *id);
        let (config, cmdline) = match rest.or(came_from) {
            Some((_, recorded)) => (recorded.machine, recorded.cmdline),
            None => (plain, None),
        };
        let (nets, macs) = saved.nets.into_iter().unzip();
        Machine {
            name: saved.name,
            key: MachineKey(self.next_key()),
            folder,
            config,
            nets,
            macs,
            boots: cmdline.map(|cmdline| Boots { cmdline, kernel: None }),
            source: saved.source,
            releasing: Mutex::new(()),
            turn: Mutex::new(()),
            state: Mutex::new(state),
            descent: Mutex::new(Descent::Stored(Lineage::ended())),
            layers: Mutex::default(),
            live: Mutex::new(None),
            rest: Mutex::new(rest_id),
            came_from: Mutex::new(came_from_id),
            discarded: AtomicBool::new(false),
            last_faults: Mutex::new(None),
            identity: Identity::new(0, saved.machine_id),
        }
    }

    fn recorded_rest(&self, id: &str) -> Result<(SnapshotId, Recorded)> {
        let entry = self.store.lookup(id)?;
        Ok((entry.id, super::config::decode(&entry.record.config)?))
    }
}
