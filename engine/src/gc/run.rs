//! A collection under way, from the moment at which packs are condemned.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::repack::{self, Copied};
use super::{GcReport, GcStep};
use crate::catalog::Catalog;
use crate::depot::{Depot, Disposal};
use crate::error::{ErrorKind, StoreError};
use crate::id::PackId;
use crate::ledger::{Ledger, Roots};
use crate::pack::PackWriter;
use crate::settings::Settings;
use crate::units::to_usize;

/// What it did not retire is taken back into use when it ends, however it
/// ends.
pub(super) struct Run<'d> {
    depot: &'d Arc<Depot>,
    settings: &'d Settings,
    /// What is needed of the condemned packs.
    roots: Roots,
    report: GcReport,
    condemned: BTreeSet<PackId>,
    /// Bytes of files that are gone.
    removed_bytes: u64,
    total_bytes: u64,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.depot.pardon(&self.condemned);
    }
}

impl<'d> Run<'d> {
    pub(super) fn new(
        depot: &'d Arc<Depot>,
        settings: &'d Settings,
        roots: Roots,
        report: GcReport,
        condemned: BTreeSet<PackId>,
    ) -> Self {
        let packs = depot.packs();
        let going = packs.iter().filter(|(pack, _)| condemned.contains(pack));
        let total_bytes = going.map(|(_, summary)| summary.file_len).sum();
        Self { depot, settings, roots, report, condemned, removed_bytes: 0, total_bytes }
    }

    /// What was done.
    pub(super) fn finish(mut self, ledger: &Ledger<'_>) -> Result<GcReport, StoreError> {
        let mut report = std::mem::take(&mut self.report);
        report.freed_bytes = self.removed_bytes.saturating_sub(report.rewritten_bytes);
        report.nodes_read = ledger.effort().nodes_read;
        report.counted_anew = ledger.effort().anew;
        report.kept_twice_bytes = ledger.kept_twice();
        Ok(report)
    }

    /// Retires what is dead, rewrites what lives beside it.
    pub(super) fn collect(
        &mut self,
        ledger: &mut Ledger<'_>,
        catalog: &Catalog,
        step: &mut dyn FnMut(GcStep),
    ) -> Result<(), StoreError> {
        ledger.follow(&self.roots)?;
        self.carry_ids(catalog)?;
        let (mut dead, mut partly) = (Vec::new(), Vec::new());
        for pack in &self.condemned {
            let lives = !ledger.needed_in(*pack)?.is_empty();
            if lives { partly.push(*pack) } else { dead.push(*pack) }
        }
        self.report.dropped_packs = self.retire(&dead, ledger, step)?;
        match self.repack(&partly, ledger, step) {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                self.report.incomplete = Some(error.to_string());
                Ok(())
            }
            done => done,
        }
    }

    /// Sees to it that no id of a pack that goes is ever given out again. If
    /// the disk is too full even for that, the packs in question stay.
    fn carry_ids(&mut self, catalog: &Catalog) -> Result<(), StoreError> {
        let carried = catalog.carried_id();
        if self.condemned.last().is_none_or(|pack| *pack <= carried) {
            return Ok(());
        }
        match catalog.carry_ids(self.depot, self.settings.clock.now_unix_ms()) {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                self.report.incomplete = Some(error.to_string());
                let stay = self.condemned.split_off(&PackId(carried.0 + 1));
                self.depot.pardon(&stay);
                Ok(())
            }
            done => done,
        }
    }

    /// Retires packs in which nothing is needed; returns how many.
    fn retire(
        &mut self,
        packs: &[PackId],
        ledger: &mut Ledger<'_>,
        step: &mut dyn FnMut(GcStep),
    ) -> Result<u64, StoreError> {
        for pack in packs {
            if !ledger.needed_in(*pack)?.is_empty() {
                return Err(StoreError::Ledger);
            }
            ledger.forget_events(*pack)?;
        }
        let mut count = 0;
        let Self { depot, condemned, removed_bytes, total_bytes, .. } = self;
        depot.retire(packs, Disposal::Remove, &mut |pack, len| {
            condemned.remove(&pack);
            *removed_bytes += len;
            count += 1;
            step(GcStep::Collect { done: *removed_bytes, total: *total_bytes });
        })?;
        ledger.save()?;
        Ok(count)
    }

    fn repack(
        &mut self,
        packs: &[PackId],
        ledger: &mut Ledger<'_>,
        step: &mut dyn FnMut(GcStep),
    ) -> Result<(), StoreError> {
        let mut at = 0;
        while at < packs.len() {
            let mut writer = self.depot.begin_pack()?;
            let path = writer.path().to_owned();
            let moved = self.fill(&packs[at..], ledger, &mut writer);
            let (tried, moved) = moved.inspect_err(|_| self.depot.abandon(&path))?;
            at += tried;
            if moved.is_empty() {
                self.depot.abandon(&path);
                continue;
            }
            let (_, len) = self.depot.publish(writer, None)?;
            self.report.rewritten_bytes += len;
            ledger.follow(&self.roots)?;
            self.report.repacked_packs += self.retire(&moved, ledger, step)?;
        }
        Ok(())
    }

    /// Copies packs until the new one is full. Returns how many were tried,
    /// and those that were copied whole.
    fn fill(
        &mut self,
        packs: &[PackId],
        ledger: &mut Ledger<'_>,
        writer: &mut PackWriter,
    ) -> Result<(usize, Vec<PackId>), StoreError> {
        let objects_max = to_usize(u64::from(self.settings.pack_objects_max));
        let (mut tried, mut moved) = (0, Vec::new());
        for pack in packs {
            let objects = writer.directory().keys.len() + self.depot.directory(*pack)?.keys.len();
            let full = objects > objects_max
                || writer.directory().content_len >= self.settings.pack_len_max;
            if tried > 0 && full {
                break;
            }
            tried += 1;
            let needed = ledger.needed_in(*pack)?;
            match repack::copy_live(self.depot, needed, *pack, writer, self.settings) {
                Ok(Copied { read_bytes }) => {
                    self.report.read_bytes += read_bytes;
                    moved.push(*pack);
                }
                Err(StoreError::Damaged { .. }) => self.report.damaged_packs += 1,
                Err(error) => return Err(error),
            }
        }
        Ok((tried, moved))
    }
}
