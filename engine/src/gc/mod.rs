//! Garbage collection beside everything else: nobody waits for it.
//!
//! What is needed: all that listed snapshots and leased images reach - roots,
//! nodes, the nodes that stored patches build on, chunks - and the records
//! and events of listed snapshots. The order of a collection:
//!
//! 0. Straighten images that take too many frames.
//! 1. Mark, and plan from the marks which packs go.
//! 2. Condemn those packs that no open session relies on, and read catalog
//!    and leases, at one instant. Mark again if anything changed.
//! 3. Retire condemned packs that are dead whole. This needs no space.
//! 4. Copy what lives in the others to new packs, publish these, retire the
//!    old ones.
//!
//! Why nothing needed is lost: an object that a session relies on was found
//! in a pack that is pinned for it until its snapshot is listed, in a pack of
//! its own, or under a leased base. So a pack that is condemned holds nothing
//! that a session found before that instant, but what the catalog or a lease
//! names at the instant; after it, sessions treat the pack as missing. The
//! second mark begins behind the instant and follows the index, which always
//! names the youngest pack that has an object, so an index built anew says
//! the same. A node that a session finds is read, and with it the base of its
//! patch, before the session relies on it: what dead nodes need may be gone.
//!
//! Why a power cut harms nothing: a new pack is durable before the index
//! forgets the old one, and that is durable before the old file goes. A pack
//! that stays without its mark is published again when the store is opened.

mod mark;
mod plan;
mod repack;
mod straighten;

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use plan::{GcAction, GcFragmented, GcOptions, GcPack, GcPlan};

use crate::catalog::{Catalog, Entry};
use crate::depot::{Depot, Disposal};
use crate::error::{ErrorKind, StoreError};
use crate::id::{PackId, SnapshotId};
use crate::pack::PackWriter;
use crate::settings::Settings;
use crate::tree::ImageRef;
use mark::{Places, mark};

/// Where the marking begins.
#[derive(Debug, PartialEq, Eq)]
struct Roots {
    images: HashSet<ImageRef>,
    snapshots: HashSet<SnapshotId>,
}

impl Roots {
    fn of(entries: &[Entry], leased: Vec<ImageRef>) -> Self {
        let images = entries.iter().flat_map(|entry| &entry.record.images);
        let mut images: HashSet<ImageRef> = images.map(|(_, image)| *image).collect();
        images.extend(leased);
        Self { images, snapshots: entries.iter().map(|entry| entry.id).collect() }
    }
}

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    /// Bytes of files that are gone, less those of new packs.
    pub freed_bytes: u64,
    /// Packs that were dead whole and are gone.
    pub dropped_packs: u64,
    /// Packs whose living objects moved and that are gone.
    pub repacked_packs: u64,
    /// Bytes of the new packs.
    pub rewritten_bytes: u64,
    /// Packs left alone because open sessions rely on them.
    pub busy_packs: u64,
    /// Packs left alone because something needed in them is damaged.
    pub damaged_packs: u64,
    /// Images whose pages were gathered into fewer frames.
    pub straightened_images: u64,
    /// Why repacking ended early: the disk is full. What was dropped stays
    /// dropped.
    pub incomplete: Option<String>,
}

/// Marks and plans, and changes nothing.
pub(crate) fn plan(
    depot: &Depot,
    catalog: &Catalog,
    settings: &Settings,
    options: GcOptions,
) -> Result<GcPlan, StoreError> {
    let _upkeep = depot.upkeep();
    let (_, leased, entries) = depot.pins().condemn(&BTreeSet::new(), || catalog.entries());
    let fragmented =
        straighten::fragmented(depot, &entries, settings, options.frames_percent_max.max(100))?;
    let plan = plan::plan(depot, &mark(depot, &Roots::of(&entries, leased))?, options)?;
    Ok(GcPlan { fragmented, ..plan })
}

/// Collects.
pub(crate) fn collect(
    depot: &Arc<Depot>,
    catalog: &Catalog,
    settings: &Settings,
    options: GcOptions,
) -> Result<GcReport, StoreError> {
    let _upkeep = depot.upkeep();
    depot.check_fence()?;
    let mut report = GcReport::default();
    gather(depot, catalog, settings, options, &mut report)?;
    let published = depot.publications();
    let (_, leased, entries) = depot.pins().condemn(&BTreeSet::new(), || catalog.entries());
    let roots = Roots::of(&entries, leased);
    let mut needed = mark(depot, &roots)?;
    let plan = plan::plan(depot, &needed, options)?;
    let chosen: BTreeSet<PackId> =
        plan.with(GcAction::Drop).into_iter().chain(plan.with(GcAction::Repack)).collect();
    let (condemned, leased, entries) = depot.pins().condemn(&chosen, || catalog.entries());
    let busy = plan.with(GcAction::Busy).len() + chosen.len() - condemned.len();
    let mut run = Run { depot, settings, report, condemned };
    run.report.busy_packs = crate::units::to_u64(busy);
    let roots_now = Roots::of(&entries, leased);
    if depot.publications() != published || roots_now != roots {
        needed = mark(depot, &roots_now)?;
    }
    let gathered = run.report.rewritten_bytes;
    run.carry_ids(catalog)?;
    run.work(&needed)?;
    run.report.freed_bytes = run.report.freed_bytes.saturating_sub(gathered);
    Ok(std::mem::take(&mut run.report))
}

/// Straightens. On a full disk that is put off: the collection makes room.
fn gather(
    depot: &Arc<Depot>,
    catalog: &Catalog,
    settings: &Settings,
    options: GcOptions,
    report: &mut GcReport,
) -> Result<(), StoreError> {
    let percent_max = options.frames_percent_max.max(100);
    match straighten::straighten(depot, &catalog.entries(), settings, percent_max) {
        Ok(done) => {
            report.straightened_images = done.images;
            report.rewritten_bytes = done.rewritten_bytes;
            Ok(())
        }
        Err(error) => match error.kind() {
            ErrorKind::NoSpace | ErrorKind::Corrupt => {
                report.incomplete = Some(error.to_string());
                Ok(())
            }
            _ => Err(error),
        },
    }
}

/// A collection under way. What it did not retire is taken back into use
/// when it ends, however it ends.
struct Run<'d> {
    depot: &'d Arc<Depot>,
    settings: &'d Settings,
    report: GcReport,
    condemned: BTreeSet<PackId>,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.depot.pardon(&self.condemned);
    }
}

impl Run<'_> {
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

    fn work(&mut self, needed: &Places) -> Result<(), StoreError> {
        let (mut dead, mut partly) = (Vec::new(), Vec::new());
        for pack in &self.condemned {
            let count = self.depot.directory(*pack)?.keys.len();
            let lives = (0..count).any(|entry| needed.contains(*pack, entry));
            if lives { partly.push(*pack) } else { dead.push(*pack) }
        }
        self.report.dropped_packs = self.retire(&dead)?;
        match self.repack(&partly, needed) {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                self.report.incomplete = Some(error.to_string());
                Ok(())
            }
            done => done,
        }
    }

    /// Retires packs; returns how many.
    fn retire(&mut self, packs: &[PackId]) -> Result<u64, StoreError> {
        let mut count = 0;
        let Self { depot, report, condemned, .. } = self;
        depot.retire(packs, Disposal::Remove, &mut |pack, len| {
            condemned.remove(&pack);
            report.freed_bytes += len;
            count += 1;
        })?;
        Ok(count)
    }

    fn repack(&mut self, packs: &[PackId], needed: &Places) -> Result<(), StoreError> {
        let mut at = 0;
        while at < packs.len() {
            let mut writer = self.depot.begin_pack()?;
            let path = writer.path().to_owned();
            let moved = self.fill(&packs[at..], needed, &mut writer);
            let (tried, moved) = moved.inspect_err(|_| self.depot.abandon(&path))?;
            at += tried;
            if moved.is_empty() {
                self.depot.abandon(&path);
                continue;
            }
            let (_, len) = self.depot.publish(writer, None)?;
            self.report.rewritten_bytes += len;
            self.report.repacked_packs += self.retire(&moved)?;
            self.report.freed_bytes = self.report.freed_bytes.saturating_sub(len);
        }
        Ok(())
    }

    /// Copies packs until the new one is full. Returns how many were tried,
    /// and those that were copied whole.
    fn fill(
        &mut self,
        packs: &[PackId],
        needed: &Places,
        writer: &mut PackWriter,
    ) -> Result<(usize, Vec<PackId>), StoreError> {
        let objects_max = crate::units::to_usize(u64::from(self.settings.pack_objects_max));
        let (mut tried, mut moved) = (0, Vec::new());
        for pack in packs {
            let objects = writer.directory().keys.len() + self.depot.directory(*pack)?.keys.len();
            let full = objects > objects_max
                || writer.directory().content_len >= self.settings.pack_len_max;
            if tried > 0 && full {
                break;
            }
            tried += 1;
            match repack::copy_live(self.depot, needed, *pack, writer, self.settings) {
                Ok(()) => moved.push(*pack),
                Err(StoreError::Damaged { .. }) => self.report.damaged_packs += 1,
                Err(error) => return Err(error),
            }
        }
        Ok((tried, moved))
    }
}
