//! Families: images that were made from each other, in an order in which
//! relatives stand side by side.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::catalog::{Entry, Role};
use crate::id::SnapshotId;
use crate::tree::{ImageRef, Splitter};

/// An image of a family.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member {
    pub(super) image: ImageRef,
    /// Plaintext bytes that its snapshot stored for the first time.
    pub(super) new_bytes: u64,
}

/// Every page image of the snapshots, once. Each family begins with the image
/// that the others descend from; who descends from whom stands behind it,
/// branch by branch. Those whose common parent is not listed any more are a
/// family still.
pub(super) fn families(entries: &[Entry]) -> Vec<Vec<Member>> {
    let listed: HashSet<SnapshotId> = entries.iter().map(|entry| entry.id).collect();
    let mut children: HashMap<SnapshotId, Vec<&Entry>> = HashMap::new();
    let mut tops: Vec<Vec<&Entry>> = Vec::new();
    let mut orphans: HashMap<SnapshotId, usize> = HashMap::new();
    for entry in entries {
        match entry.record.parent {
            None => tops.push(vec![entry]),
            Some(parent) if listed.contains(&parent) => {
                children.entry(parent).or_default().push(entry);
            }
            Some(parent) => {
                let at = *orphans.entry(parent).or_insert(tops.len());
                tops.resize_with(tops.len().max(at + 1), Vec::new);
                tops[at].push(entry);
            }
        }
    }
    let mut seen = HashSet::new();
    tops.iter().flat_map(|top| members(top, &children, &mut seen)).collect()
}

/// The families of some snapshots and their descendants, one for each role.
fn members(
    tops: &[&Entry],
    children: &HashMap<SnapshotId, Vec<&Entry>>,
    seen: &mut HashSet<ImageRef>,
) -> Vec<Vec<Member>> {
    let mut by_role: BTreeMap<Role, Vec<Member>> = BTreeMap::new();
    let mut open: Vec<&Entry> = tops.iter().rev().copied().collect();
    while let Some(entry) = open.pop() {
        for (role, image) in &entry.record.images {
            if image.splitter == Splitter::Fixed4K && seen.insert(*image) {
                let member = Member { image: *image, new_bytes: entry.new_bytes };
                by_role.entry(*role).or_default().push(member);
            }
        }
        open.extend(children.get(&entry.id).into_iter().flatten().rev());
    }
    by_role.into_values().collect()
}
