//! Committing: the one step that makes a session's images a snapshot.

use std::collections::BTreeMap;

use super::session::Session;
use crate::catalog::{Event, EventKind, LoggedEvent, SnapshotRecord};
use crate::error::StoreError;
use crate::id::{EventId, Name, SnapshotId};
use crate::pack::ObjectKind;

/// What a snapshot is called.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommitOptions {
    /// Its name; it must be free.
    pub name: Option<Name>,
    /// What else to remember: at most 64 labels.
    pub labels: BTreeMap<String, String>,
}

/// A snapshot that is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// Its id.
    pub id: SnapshotId,
    /// Bytes of its images.
    pub logical_bytes: u64,
    /// Plaintext bytes that the session stored for the first time.
    pub new_bytes: u64,
    /// Bytes that the session added to packs.
    pub stored_bytes: u64,
}

impl Session {
    /// Makes the images a snapshot. When this returns, it survives a power
    /// cut; when it fails, there is no such snapshot.
    ///
    /// # Errors
    /// If the name is taken, an image is not in the store, or something
    /// cannot be written.
    pub fn commit(
        mut self,
        record: &SnapshotRecord,
        options: CommitOptions,
    ) -> Result<Committed, StoreError> {
        record.check().map_err(|source| StoreError::BadObject {
            what: "snapshot record",
            id: record.id().to_string(),
            source,
        })?;
        for (_, image) in &record.images {
            self.keep(image)?;
        }
        let id = record.id();
        let event = Event {
            kind: EventKind::Commit,
            time_unix_ms: self.settings.clock.now_unix_ms(),
            snapshot: id,
            name: options.name,
            new_bytes: self.sink.totals.new_bytes,
            labels: options.labels,
        };
        let catalog = self.catalog.clone();
        let guard = catalog.reserve(event.name.as_ref())?;
        self.sink.put_catalog(id.key(), ObjectKind::Snapshot, &record.encode())?;
        self.append_event(event, Some(record.clone()))?;
        drop(guard);
        Ok(Committed {
            id,
            logical_bytes: record.logical_bytes(),
            new_bytes: self.sink.totals.new_bytes,
            stored_bytes: self.sink.totals.stored_bytes,
        })
    }

    /// Gives a committed snapshot another name.
    pub(crate) fn commit_tag(mut self, id: SnapshotId, name: Name) -> Result<(), StoreError> {
        let catalog = self.catalog.clone();
        let guard = catalog.reserve(Some(&name))?;
        let event = Event {
            kind: EventKind::Tag,
            time_unix_ms: self.settings.clock.now_unix_ms(),
            snapshot: id,
            name: Some(name),
            new_bytes: 0,
            labels: BTreeMap::new(),
        };
        self.append_event(event, None)?;
        drop(guard);
        Ok(())
    }

    /// Puts the event into the pack, seals it, and then into the root log.
    fn append_event(
        &mut self,
        event: Event,
        record: Option<SnapshotRecord>,
    ) -> Result<(), StoreError> {
        event.check().map_err(|source| StoreError::BadObject {
            what: "catalog event for snapshot",
            id: event.snapshot.to_string(),
            source,
        })?;
        let bytes = event.encode();
        self.sink.put_catalog(EventId::of(&bytes).key(), ObjectKind::Event, &bytes)?;
        self.sink.seal()?;
        let depot = self.sink.depot().clone();
        let stored_bytes = self.sink.totals.stored_bytes;
        let pack = depot.highest_pack();
        self.catalog.append(&depot, &LoggedEvent { event, record, pack, stored_bytes })
    }
}
