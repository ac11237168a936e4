//! Check: is every stored byte what was written, and is everything there that
//! a snapshot needs?
//!
//! Three passes: every frame of every pack is read and hashed; every entry of
//! the index must name an object that its pack lists; every snapshot must
//! reach only sound objects. What is bad is no longer used for deduplication,
//! so that ingesting the same bytes again heals it. Last, the ledger is compared
//! with a full mark.

mod packs;
mod repair;
mod report;
mod scope;
mod trees;

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::catalog::Catalog;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::ingest::Progress;
use crate::ledger::{Ledger, Roots, mark};
use crate::units::to_u64;

pub use repair::RepairReport;
pub(crate) use repair::repair;
use report::Findings;
pub use report::{CheckReport, Damage};
pub use scope::CheckScope;

/// Reads and checks everything, or as much as the scope says.
pub(crate) fn check(
    depot: &Arc<Depot>,
    catalog: &Catalog,
    scope: CheckScope,
    progress: &mut dyn FnMut(Progress),
) -> Result<CheckReport, StoreError> {
    depot.forget_cached();
    let mut findings = Findings::default();
    let packs = depot.packs();
    let total = packs.iter().map(|(_, pack)| pack.file_len).sum();
    let mut done = 0;
    for (pack, summary) in &packs {
        packs::check_pack(depot, *pack, scope, &mut findings, &mut |bytes| {
            done += bytes;
            progress(Progress { done: done.min(total), total: Some(total), new_bytes: 0 });
        })?;
        findings.report.packs += 1;
        findings.report.bytes += summary.file_len;
    }
    for (pack, problem) in depot.unreadable() {
        findings.bad_pack(pack, None, format!("the pack was left out at opening: {problem}"));
    }
    packs::check_index(depot, &mut findings)?;
    let entries = catalog.entries();
    findings.report.snapshots = to_u64(entries.len());
    trees::check_trees(depot, &entries, &mut findings)?;
    let mut report = findings.settle(depot)?;
    // Who only looks has no ledger.
    report.recounted = report.is_clean() && !depot.is_read_only() && recount(depot, catalog)?;
    Ok(report)
}

/// Compares the ledger with a full mark. If they differ it is counted anew,
/// which is told. Pays only if nothing is published meanwhile.
fn recount(depot: &Arc<Depot>, catalog: &Catalog) -> Result<bool, StoreError> {
    let published = depot.publications();
    let (_, leased, entries) = depot.pins().condemn(&BTreeSet::new(), || catalog.entries());
    let roots = Roots::of(&entries, leased);
    let mut ledger = Ledger::current(depot, &roots)?;
    let marked = mark(depot, &roots)?;
    let differs = ledger.differs_from(&marked)?;
    match differs {
        Some(pack) if depot.publications() == published => {
            tracing::warn!(%pack, "the ledger is wrong about a pack; it is counted anew");
            Ledger::anew(depot, &roots).map(|_| true)
        }
        _ => Ok(false),
    }
}
