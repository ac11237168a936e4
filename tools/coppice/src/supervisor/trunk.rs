//! A machine at the instant at which it was forked while it ran.
//!
//! Its children run on layers and frozen overlays at once. The store gets the
//! same behind them, and a child that is captured itself waits for that: its
//! own capture builds on it. Nobody was told that it is durable before it is.

use std::sync::{Arc, Mutex, Weak};

use anyhow::{Context, Result};

use super::Supervisor;
use super::capture::recorded;
use super::config::Recorded;
use super::freeze::Frozen;
use super::machine::{Descent, Lineage, Machine, lock};

/// What the children of one live fork grow from.
#[derive(Debug)]
pub(crate) struct Trunk {
    parent: Weak<Machine>,
    /// What the parent itself continued at that instant.
    below: Descent,
    /// Its configuration, as the store keeps it.
    config: Recorded,
    frozen: Frozen,
    /// Held while it is being stored.
    stored: Mutex<Option<Lineage>>,
}

impl Trunk {
    /// Of a machine that has just been frozen.
    pub(crate) fn new(parent: &Arc<Machine>, below: Descent, frozen: Frozen) -> Self {
        let config = recorded(parent);
        Self { parent: Arc::downgrade(parent), below, config, frozen, stored: Mutex::default() }
    }
}

impl Supervisor {
    /// The images that a machine continues; waits until the store has them,
    /// or sees to that itself if an earlier attempt failed.
    pub(crate) fn lineage_of(&self, descent: &Descent) -> Result<Lineage> {
        let trunk = match descent {
            Descent::Stored(lineage) => return Ok(lineage.clone()),
            Descent::Live(trunk) => trunk,
        };
        let mut stored = lock(&trunk.stored);
        if let Some(lineage) = &*stored {
            return Ok(lineage.clone());
        }
        let below = self.lineage_of(&trunk.below)?;
        let (_, lineage) = self
            .store_frozen(&trunk.config, &trunk.frozen, &below, None)
            .context("cannot store the machine that this one was forked from")?;
        Ok(stored.insert(lineage).clone())
    }

    /// Stores a trunk behind its children.
    pub(crate) fn store_trunk(&self, trunk: &Arc<Trunk>) {
        let lineage = match self.lineage_of(&Descent::Live(Arc::clone(trunk))) {
            Ok(lineage) => lineage,
            // Whoever captures a child tries again, and is told.
            Err(error) => return tracing::warn!(%error, "a live fork is not stored"),
        };
        for machine in self.table.list() {
            let mut descent = lock(&machine.descent);
            if matches!(&*descent, Descent::Live(other) if Arc::ptr_eq(other, trunk)) {
                *descent = Descent::Stored(lineage.clone());
            }
        }
        if let Some(parent) = trunk.parent.upgrade() {
            self.grow(&parent, lineage);
        }
    }

    /// Lets later captures of a machine build on this one.
    pub(crate) fn grow(&self, machine: &Machine, lineage: Lineage) {
        let covered = lineage.instant;
        let mut descent = lock(&machine.descent);
        let newer = match &*descent {
            Descent::Stored(known) => known.instant < covered,
            Descent::Live(_) => true,
        };
        if newer && machine.state().is_alive() {
            *descent = Descent::Stored(lineage);
        }
        drop(descent);
        if machine.state().is_alive()
            && let Err(error) = self.fold_overlays(machine, covered)
        {
            tracing::warn!(machine = machine.name, %error, "overlays are not folded");
        }
    }
}
