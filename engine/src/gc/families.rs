//! Families: images that were made from each other, in an order in which
//! relatives stand side by side.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::catalog::{Entry, Role};
use crate::id::SnapshotId;
use crate::tree::{ImageRef, Splitter};

/// Every page image of the snapshots, once. Each family begins with the image
/// that the others descend from; who descends from whom stands behind it,
/// branch by branch.
pub(super) fn families(entries: &[Entry]) -> Vec<Vec<ImageRef>> {
    let listed: HashMap<SnapshotId, &Entry> = entries.iter().map(|e| (e.id, e)).collect();
    let mut children: HashMap<SnapshotId, Vec<&Entry>> = HashMap::new();
    let mut tops = Vec::new();
    for entry in entries {
        match entry.record.parent.filter(|parent| listed.contains_key(parent)) {
            Some(parent) => children.entry(parent).or_default().push(entry),
            None => tops.push(entry),
        }
    }
    let mut seen = HashSet::new();
    tops.into_iter().flat_map(|top| members(top, &children, &mut seen)).collect()
}

/// The families of a snapshot and its descendants, one for each role.
fn members(
    top: &Entry,
    children: &HashMap<SnapshotId, Vec<&Entry>>,
    seen: &mut HashSet<ImageRef>,
) -> Vec<Vec<ImageRef>> {
    let mut by_role: BTreeMap<Role, Vec<ImageRef>> = BTreeMap::new();
    let mut open = vec![top];
    while let Some(entry) = open.pop() {
        for (role, image) in &entry.record.images {
            if image.splitter == Splitter::Fixed4K && seen.insert(*image) {
                by_role.entry(*role).or_default().push(*image);
            }
        }
        open.extend(children.get(&entry.id).into_iter().flatten().rev());
    }
    by_role.into_values().collect()
}
