//! Garbage collection beside everything else: nobody waits for it.
//!
//! What is needed: all that listed snapshots and leased images reach - roots,
//! nodes, the nodes that stored patches build on, chunks - and the records
//! and events of listed snapshots. The ledger knows, and follows what came
//! and went since the last collection. The order of a collection:
//!
//! 0. Straighten images that take too many frames.
//! 1. Bring the ledger up to date, and plan from it which packs go.
//! 2. Condemn those packs that no open session relies on, and read catalog
//!    and leases, at one instant. Bring the ledger up to date again.
//! 3. Retire condemned packs that are dead whole. This needs no space.
//! 4. Copy what lives in the others to new packs, publish these, let the
//!    ledger follow, retire the old ones.
//!
//! Why nothing needed is lost: an object that a session relies on was found
//! in a pack that is pinned for it until its snapshot is listed, in a pack of
//! its own, or under a leased base. So a pack that is condemned holds nothing
//! that a session found before that instant, but what the catalog or a lease
//! names at the instant; after it, sessions treat the pack as missing. The
//! ledger follows once more behind the instant. A node that a session finds is
//! read, and with it the base of its patch, before the session relies on it:
//! what dead nodes need may be gone. A pack goes only when the ledger has no
//! bit left in it.
//!
//! Why a power cut harms nothing: a new pack is durable before the index
//! forgets the old one, and that is durable before the old file goes. A pack
//! that stays without its mark is published again when the store is opened.

mod cells;
mod families;
mod layout;
mod lifetimes;
mod looked;
mod plan;
mod repack;
mod report;
mod run;
mod straighten;

use std::collections::BTreeSet;
use std::sync::Arc;

pub use plan::{GcAction, GcFragmented, GcOptions, GcPack, GcPlan};
pub use report::{GcReport, GcStep};

use crate::account::{self, StoreBill};
use crate::catalog::Catalog;
use crate::depot::Depot;
use crate::error::{ErrorKind, StoreError};
use crate::id::PackId;
use crate::ledger::{Ledger, Roots};
use crate::settings::Settings;
use run::Run;
use straighten::Budget;

/// What is listed and leased now.
fn roots_now(depot: &Depot, catalog: &Catalog) -> Roots {
    let (_, leased, entries) = depot.pins().condemn(&BTreeSet::new(), || catalog.entries());
    Roots::of(&entries, leased)
}

fn budget(settings: &Settings, options: GcOptions) -> Budget<'_> {
    Budget { settings, percent_max: u64::from(options.frames_percent_max.max(100)) }
}

/// Where the bytes of the store are.
pub(crate) fn totals(depot: &Depot, catalog: &Catalog) -> Result<(StoreBill, u64), StoreError> {
    let _upkeep = depot.upkeep();
    let ledger = Ledger::current(depot, &roots_now(depot, catalog))?;
    let bill = account::of_ledger(depot, &ledger, catalog.log_len());
    Ok((bill, ledger.effort().nodes_read))
}

/// What the last count says is kept twice.
pub(crate) fn kept_twice_when_counted(depot: &Depot) -> Result<Option<u64>, StoreError> {
    Ledger::kept_twice_when_counted(depot)
}

/// Plans, and changes nothing.
pub(crate) fn plan(
    depot: &Depot,
    catalog: &Catalog,
    settings: &Settings,
    options: GcOptions,
) -> Result<GcPlan, StoreError> {
    let _upkeep = depot.upkeep();
    let budget = budget(settings, options);
    let (fragmented, gathered_pages, gathered_bytes) =
        straighten::fragmented(depot, &catalog.entries(), budget)?;
    let ledger = Ledger::current(depot, &roots_now(depot, catalog))?;
    let kept_twice_bytes = ledger.kept_twice();
    let plan = plan::plan(depot, &ledger, options);
    Ok(GcPlan { fragmented, gathered_pages, gathered_bytes, kept_twice_bytes, ..plan })
}

/// Collects.
pub(crate) fn collect(
    depot: &Arc<Depot>,
    catalog: &Catalog,
    settings: &Settings,
    options: GcOptions,
    step: &mut dyn FnMut(GcStep),
) -> Result<GcReport, StoreError> {
    let _upkeep = depot.upkeep();
    depot.check_fence()?;
    let mut report = GcReport::default();
    step(GcStep::Straighten);
    gather(depot, catalog, settings, options, &mut report)?;
    step(GcStep::Count);
    let mut ledger = Ledger::current(depot, &roots_now(depot, catalog))?;
    let plan = plan::plan(depot, &ledger, options);
    let chosen: BTreeSet<PackId> =
        plan.with(GcAction::Drop).into_iter().chain(plan.with(GcAction::Repack)).collect();
    let (condemned, leased, entries) = depot.pins().condemn(&chosen, || catalog.entries());
    let busy = plan.with(GcAction::Busy).len() + chosen.len() - condemned.len();
    report.busy_packs = crate::units::to_u64(busy);
    let roots = Roots::of(&entries, leased);
    let mut run = Run::new(depot, settings, roots, report, condemned);
    run.collect(&mut ledger, catalog, step)?;
    run.finish(&ledger)
}

/// Straightens. On a full disk that is put off: the collection makes room.
fn gather(
    depot: &Arc<Depot>,
    catalog: &Catalog,
    settings: &Settings,
    options: GcOptions,
    report: &mut GcReport,
) -> Result<(), StoreError> {
    match straighten::straighten(depot, &catalog.entries(), budget(settings, options)) {
        Ok(done) => {
            report.straightened_images = done.images;
            report.rewritten_bytes = done.rewritten_bytes;
            report.gathered_bytes = done.rewritten_bytes;
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
