//! How snapshots relate: what differs, who descends from whom, and what each
//! of them costs.

use std::collections::{BTreeSet, HashSet};
use std::time::Instant;

use anyhow::Result;
use coppice_engine::{Accounts, Entry, Frees, ImageRef, Role, SnapshotId};

use super::Supervisor;
use super::catalog::{kind, part_name};
use crate::rpc::{
    DiffExtent, Difference, LineageLine, PartDifference, Reply, SnapshotUsage, Usage,
};

/// Extents told of one part; more would not fit a message.
const EXTENTS_MAX: usize = 1 << 20;

impl Supervisor {
    /// What the store's bytes are for, and what one snapshot would free.
    pub(crate) fn usage(&self, name: Option<&str>) -> Result<Reply> {
        let begun = Instant::now();
        let entry = name.map(|name| self.find(name)).transpose()?;
        let (store, mut nodes_walked) = self.store.totals()?;
        let mut snapshot = None;
        if let Some(entry) = entry {
            let accounts = self.store.accounts()?;
            nodes_walked += accounts.nodes_walked();
            snapshot = Some(snapshot_usage(&accounts, entry.id)?);
        }
        Ok(Reply::Usage(Usage {
            store,
            snapshot,
            nodes_walked,
            seconds: begun.elapsed().as_secs_f64(),
        }))
    }

    /// Where two snapshots differ, part by part.
    pub(crate) fn diff(&self, one: &str, other: &str) -> Result<Reply> {
        let begun = Instant::now();
        let entries = [self.find(one)?, self.find(other)?];
        let roles: BTreeSet<Role> =
            entries.iter().flat_map(|entry| &entry.record.images).map(|(role, _)| *role).collect();
        let mut nodes_walked = 0;
        let mut parts = Vec::new();
        for role in roles {
            let what = part_name(role, kind(&entries[0]));
            let part = match entries.each_ref().map(|entry| entry.record.image(role).copied()) {
                [Some(left), Some(right)] => {
                    let (part, nodes) = self.compare(what, &left, &right)?;
                    nodes_walked += nodes;
                    part
                }
                [left, right] => {
                    let owner = if left.is_some() { one } else { other };
                    alone(what, owner, [left, right])
                }
            };
            parts.push(part);
        }
        let seconds = begun.elapsed().as_secs_f64();
        Ok(Reply::Differs(Difference { parts, nodes_walked, seconds }))
    }

    fn compare(
        &self,
        what: String,
        left: &ImageRef,
        right: &ImageRef,
    ) -> Result<(PartDifference, u64)> {
        let found = self.store.diff(left, right)?;
        let told = found.extents().take(EXTENTS_MAX);
        let extents = told.map(|run| DiffExtent { offset: run.start, length: run.end - run.start });
        let part = PartDifference {
            part: what,
            only_in: None,
            logical_bytes: [left.len, right.len],
            changed_bytes: found.bytes(),
            extents: extents.collect(),
            extents_left_off: u64::try_from(found.runs.len().saturating_sub(EXTENTS_MAX))?,
        };
        Ok((part, found.nodes_walked))
    }

    /// All snapshots with their parents.
    pub(crate) fn lineage(&self, usage: bool) -> Result<Reply> {
        let entries = self.store.snapshots();
        let accounts = if usage { Some(self.store.accounts()?) } else { None };
        let listed: HashSet<SnapshotId> = entries.iter().map(|entry| entry.id).collect();
        let lines = entries.iter().map(|entry| {
            let usage = accounts.as_ref().map(|accounts| accounts.frees(entry.id));
            Ok(lineage_line(entry, &listed, usage.transpose()?))
        });
        Ok(Reply::Lineage(lines.collect::<Result<_>>()?))
    }
}

fn snapshot_usage(accounts: &Accounts, id: SnapshotId) -> Result<SnapshotUsage> {
    let subtree = accounts.subtree(id);
    Ok(SnapshotUsage {
        own: accounts.bill(&HashSet::from([id]))?,
        subtree: accounts.bill(&subtree)?,
        subtree_snapshots: u64::try_from(subtree.len())?,
    })
}

fn alone(what: String, owner: &str, sides: [Option<ImageRef>; 2]) -> PartDifference {
    PartDifference {
        part: what,
        only_in: Some(owner.to_owned()),
        logical_bytes: sides.map(|side| side.map_or(0, |image| image.len)),
        changed_bytes: 0,
        extents: Vec::new(),
        extents_left_off: 0,
    }
}

fn lineage_line(entry: &Entry, listed: &HashSet<SnapshotId>, usage: Option<Frees>) -> LineageLine {
    let parent = entry.record.parent;
    LineageLine {
        id: entry.id.to_string(),
        names: entry.names.iter().map(ToString::to_string).collect(),
        kind: kind(entry).to_owned(),
        parent: parent.map(|id| id.to_string()),
        parent_removed: parent.is_some_and(|id| !listed.contains(&id)),
        logical_bytes: entry.record.images.iter().map(|(_, image)| image.len).sum(),
        stored_bytes: entry.stored_bytes,
        created_unix_ms: entry.created_unix_ms,
        usage,
    }
}
