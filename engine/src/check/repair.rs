//! Repair: damaged packs are put aside, what is sound in them is kept.
//!
//! Every sound frame of a damaged pack is copied as it is into a new pack,
//! which is durable and published before the index forgets the old one. Then
//! the old file is moved to `quarantine/`, never removed: somebody may know
//! more about it than its checksums do. Objects that another pack has too are
//! found there from then on. What is left is lost, and a check names it; the
//! same bytes, ingested again, heal it.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::CheckReport;
use crate::catalog::Catalog;
use crate::depot::{Depot, Disposal};
use crate::error::StoreError;
use crate::id::PackId;
use crate::pack::frame::{self, EncodedFrame};
use crate::pack::{PackWriter, scan};
use crate::units::{to_u64, to_usize};

/// What a repair did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairReport {
    /// Packs that were put aside.
    pub quarantined: Vec<PackId>,
    /// Objects that were sound in them and are kept.
    pub salvaged_objects: u64,
    /// Frames of them that are not sound.
    pub lost_frames: u64,
    /// Damaged packs that open sessions rely on; repair again later.
    pub busy: Vec<PackId>,
}

/// Puts the packs aside in which a check found damage.
pub(crate) fn repair(
    depot: &Arc<Depot>,
    catalog: &Catalog,
    now_unix_ms: u64,
    found: &CheckReport,
) -> Result<RepairReport, StoreError> {
    depot.check_fence()?;
    let known: BTreeSet<PackId> = depot.packs().into_iter().map(|(pack, _)| pack).collect();
    let damaged: BTreeSet<PackId> = found
        .damages
        .iter()
        .filter_map(|damage| damage.pack)
        .chain(found.healed_packs.iter().copied())
        .filter(|p| known.contains(p))
        .collect();
    let (condemned, _, ()) = depot.pins().condemn(&damaged, || ());
    let mut report = RepairReport::default();
    report.busy.extend(damaged.difference(&condemned));
    let outcome = catalog
        .carry_ids(depot, now_unix_ms)
        .and_then(|()| condemned.iter().try_for_each(|pack| put_aside(depot, *pack, &mut report)));
    let left: BTreeSet<PackId> =
        condemned.into_iter().filter(|pack| !report.quarantined.contains(pack)).collect();
    depot.pardon(&left);
    outcome.map(|()| report)
}

fn put_aside(
    depot: &Arc<Depot>,
    pack: PackId,
    report: &mut RepairReport,
) -> Result<(), StoreError> {
    depot.forget_cached();
    if depot.file(pack).is_ok() {
        let mut writer = depot.begin_pack()?;
        let path = writer.path().to_owned();
        let (objects, lost) =
            salvage(depot, pack, &mut writer).inspect_err(|_| depot.abandon(&path))?;
        if objects > 0 {
            depot.publish(writer, None)?;
        } else {
            depot.abandon(&path);
        }
        report.salvaged_objects += objects;
        report.lost_frames += lost;
    }
    depot.retire(&[pack], Disposal::Quarantine, &mut |pack, _| report.quarantined.push(pack))
}

/// Copies sound frames; returns how many objects are in them, and how many
/// frames are not sound. Of a pack whose tables cannot even be read, the
/// frames are walked as far as they can be.
fn salvage(depot: &Depot, pack: PackId, writer: &mut PackWriter) -> Result<(u64, u64), StoreError> {
    let file = depot.file(pack)?;
    let directory = match scan::list(&*file, pack) {
        Ok(listing) => listing.directory,
        Err(error) => {
            tracing::warn!(%pack, %error, "the tables of a pack cannot be read");
            scan::walk_readable(&*file)
        }
    };
    let (mut objects, mut lost) = (0, 0);
    for span in &directory.frames {
        let bytes = file.read_at(span.offset, to_usize(u64::from(span.len)));
        let sound = bytes.ok().and_then(|bytes| {
            let plain = frame::decode(&bytes).ok()?;
            let keys = scan::keys_of(&plain).ok()?;
            let lens = plain.lens().ok()?;
            Some(EncodedFrame { kind: plain.kind, bytes, keys, lens })
        });
        match sound {
            Some(sound) => {
                objects += to_u64(sound.keys.len());
                writer.append(&sound)?;
            }
            None => lost += 1,
        }
    }
    Ok((objects, lost))
}
