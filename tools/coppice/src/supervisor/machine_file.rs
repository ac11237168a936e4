//! `machine.json`: what a later supervisor needs to say about a machine whose
//! supervisor ended, so that its logs can be read and its folder removed.

use std::sync::Mutex;

use anyhow::{Context, Result};
use coppice_runtime::protocol::{MachineConfig, MachineKey};
use serde::{Deserialize, Serialize};

use super::machine::{Descent, Identity, Lineage, Machine, State};
use super::paths::Paths;
use super::table::Table;

const FILE: &str = "machine.json";

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    name: String,
    source: Option<String>,
    memory_bytes: u64,
    vcpus: u32,
    ended: Option<String>,
    failed: bool,
}

/// Writes or replaces a machine's file.
pub(crate) fn write(machine: &Machine) -> Result<()> {
    let state = machine.state();
    let ended = state.reason().map(str::to_owned);
    let saved = Saved {
        name: machine.name.clone(),
        source: machine.source.clone(),
        memory_bytes: machine.config.memory_bytes,
        vcpus: machine.config.vcpus,
        ended,
        failed: matches!(state, State::Failed(_)),
    };
    let path = machine.folder.join(FILE);
    let partial = machine.folder.join("machine.json.tmp");
    std::fs::write(&partial, serde_json::to_vec(&saved)?)
        .with_context(|| format!("cannot write {}", partial.display()))?;
    std::fs::rename(&partial, &path).with_context(|| format!("cannot write {}", path.display()))
}

/// Lists the machines that an earlier supervisor left behind, as ended.
pub(crate) fn find_ended(paths: &Paths, table: &Table) -> Result<()> {
    for folder in std::fs::read_dir(paths.machines())? {
        let folder = folder?.path();
        if !folder.is_dir() {
            continue;
        }
        let Ok(bytes) = std::fs::read(folder.join(FILE)) else {
            // It was being made when its supervisor ended: nobody knows it.
            std::fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot remove {}", folder.display()))?;
            continue;
        };
        let Ok(saved) = serde_json::from_slice::<Saved>(&bytes) else { continue };
        let state = match saved.ended {
            Some(reason) if saved.failed => State::Failed(reason),
            Some(reason) => State::Stopped(reason),
            None => State::Failed("its supervisor ended while it ran".to_owned()),
        };
        table.restore(Machine {
            name: saved.name,
            key: MachineKey(0),
            folder,
            config: MachineConfig {
                memory_bytes: saved.memory_bytes,
                vcpus: saved.vcpus,
                disks: Vec::new(),
            },
            nets: Vec::new(),
            boots: None,
            source: saved.source,
            releasing: Mutex::new(()),
            turn: Mutex::new(()),
            state: Mutex::new(state),
            descent: Mutex::new(Descent::Stored(Lineage::ended())),
            layers: Mutex::default(),
            live: Mutex::new(None),
            last_faults: Mutex::new(None),
            identity: Identity::new(0),
        });
    }
    Ok(())
}
