//! The catalog in memory: what the history adds up to.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::event::EventKind;
use super::{LoggedEvent, SnapshotRecord};
use crate::error::StoreError;
use crate::id::{Name, SnapshotId};
use crate::tree::ImageRef;

/// A snapshot in the catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its id.
    pub id: SnapshotId,
    /// Its names, ascending.
    pub names: BTreeSet<Name>,
    /// What it consists of.
    pub record: SnapshotRecord,
    /// When it was committed first, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Plaintext bytes that its commits stored for the first time.
    pub new_bytes: u64,
    /// Bytes that its commits added to packs.
    pub stored_bytes: u64,
    /// What else the caller wanted to remember.
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// By the order of their first commit.
    entries: BTreeMap<u64, Entry>,
    /// Sorted, so that the beginning of an id is found too.
    order: BTreeMap<SnapshotId, u64>,
    /// How many listed snapshots have an image.
    images: HashMap<ImageRef, u64>,
    names: BTreeMap<Name, SnapshotId>,
    next_order: u64,
}

/// Fewer digits of an id than this are not looked up.
const PREFIX_LEN_MIN: usize = 4;

impl State {
    pub(super) fn apply(&mut self, logged: &LoggedEvent) {
        let event = &logged.event;
        match event.kind {
            EventKind::Commit => self.commit(logged),
            EventKind::Tag => {
                if let Some(name) = &event.name {
                    self.name(name, event.snapshot);
                }
            }
            EventKind::Untag => {
                if let Some(name) = &event.name {
                    self.unname(name);
                }
            }
            EventKind::Drop => self.remove(&event.snapshot),
        }
    }

    fn commit(&mut self, logged: &LoggedEvent) {
        let event = &logged.event;
        let Some(record) = &logged.record else { return };
        if !self.order.contains_key(&event.snapshot) {
            for (_, image) in &record.images {
                *self.images.entry(*image).or_default() += 1;
            }
        }
        let next_order = &mut self.next_order;
        let order = *self.order.entry(event.snapshot).or_insert_with(|| {
            *next_order += 1;
            *next_order
        });
        let entry = self.entries.entry(order).or_insert_with(|| Entry {
            id: event.snapshot,
            names: BTreeSet::new(),
            record: record.clone(),
            created_unix_ms: event.time_unix_ms,
            new_bytes: 0,
            stored_bytes: 0,
            labels: BTreeMap::new(),
        });
        entry.new_bytes += event.new_bytes;
        entry.stored_bytes += logged.stored_bytes;
        entry.labels.extend(event.labels.clone());
        if let Some(name) = &event.name {
            self.name(name, event.snapshot);
        }
    }

    fn entry_mut(&mut self, id: &SnapshotId) -> Option<&mut Entry> {
        self.entries.get_mut(self.order.get(id)?)
    }

    fn name(&mut self, name: &Name, id: SnapshotId) {
        if self.names.get(name).is_some_and(|other| *other != id) {
            self.unname(name);
        }
        if let Some(entry) = self.entry_mut(&id) {
            entry.names.insert(name.clone());
            self.names.insert(name.clone(), id);
        }
    }

    /// A snapshot that loses its last name leaves the listing.
    fn unname(&mut self, name: &Name) {
        let Some(id) = self.names.remove(name) else { return };
        let Some(entry) = self.entry_mut(&id) else { return };
        entry.names.remove(name);
        if entry.names.is_empty() {
            self.remove(&id);
        }
    }

    fn remove(&mut self, id: &SnapshotId) {
        if let Some(entry) = self.order.remove(id).and_then(|order| self.entries.remove(&order)) {
            for (_, image) in &entry.record.images {
                if let Some(count) = self.images.get_mut(image) {
                    *count -= 1;
                    if *count == 0 {
                        self.images.remove(image);
                    }
                }
            }
            entry.names.iter().for_each(|name| {
                self.names.remove(name);
            });
        }
    }

    pub(super) fn has_name(&self, name: &Name) -> bool {
        self.names.contains_key(name)
    }

    pub(super) fn get(&self, id: &SnapshotId) -> Option<&Entry> {
        self.entries.get(self.order.get(id)?)
    }

    pub(super) fn lists(&self, image: &ImageRef) -> bool {
        self.images.contains_key(image)
    }

    pub(super) fn entries(&self) -> Vec<Entry> {
        self.entries.values().cloned().collect()
    }

    pub(super) fn lookup(&self, text: &str) -> Result<Entry, StoreError> {
        let by_name = text.parse().ok().and_then(|name: Name| self.names.get(&name));
        if let Some(entry) = by_name.and_then(|id| self.get(id)) {
            return Ok(entry.clone());
        }
        let prefix = text.to_ascii_lowercase();
        let mut matches = self.beginning_with(&prefix);
        match (matches.next(), matches.next()) {
            (Some(entry), None) => Ok(entry.clone()),
            (Some(_), Some(_)) => Err(StoreError::Ambiguous(text.to_owned())),
            (None, _) => Err(StoreError::NotFound(text.to_owned())),
        }
    }

    /// Snapshots whose id begins with these hexadecimal digits.
    fn beginning_with<'s>(&'s self, prefix: &'s str) -> impl Iterator<Item = &'s Entry> {
        let first = format!("{prefix:0<64}").parse::<SnapshotId>();
        let first = first.ok().filter(|_| prefix.len() >= PREFIX_LEN_MIN);
        first
            .into_iter()
            .flat_map(|first| self.order.range(first..))
            .take_while(move |(id, _)| id.to_string().starts_with(prefix))
            .filter_map(|(_, order)| self.entries.get(order))
    }
}
