//! Events in the packs: those about listed snapshots are needed.

use std::collections::HashSet;

use super::{Ledger, event_row};
use crate::catalog::Event;
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId, SnapshotId};
use crate::index::Place;
use crate::index::rows::EVENT;
use crate::pack::{EntryNo, FrameKind, ObjectKind, object};
use crate::units::to_usize;

impl Ledger<'_> {
    /// Reads the events in packs that the ledger does not know yet.
    pub(super) fn learn_packs(&mut self) -> Result<(), StoreError> {
        for (pack, _) in self.depot.packs() {
            if self.packs.contains_key(&pack) {
                continue;
            }
            for (event, key, _) in self.events_in(pack)? {
                self.changes.push((event_row(&event.snapshot, key), Some(Vec::new())));
                self.fresh_events.entry(event.snapshot).or_default().insert(key);
                if self.roots.snapshots.contains(&event.snapshot) {
                    self.count_once(key, true)?;
                }
            }
            self.learn_copies_in(pack)?;
            self.packs.insert(pack, super::PackRow::default());
            self.touched.insert(pack);
        }
        Ok(())
    }

    fn events_in(&self, pack: PackId) -> Result<Vec<(Event, ObjectKey, Place)>, StoreError> {
        let directory = self.depot.directory(pack)?;
        let mut found = Vec::new();
        for span in directory.frames.iter().filter(|span| span.kind == FrameKind::Catalog) {
            let frame = self.depot.frame(pack, span)?;
            let damaged = |source| StoreError::Damaged { pack, offset: span.offset, source };
            for (object, entry) in object::list(&frame).map_err(damaged)?.iter().zip(span.first.0..)
            {
                if object.kind == ObjectKind::Event {
                    let event = Event::decode(object.bytes).map_err(damaged)?;
                    let key = directory.keys[to_usize(u64::from(entry))];
                    found.push((event, key, Place { pack, entry: EntryNo(entry) }));
                }
            }
        }
        Ok(found)
    }

    /// Counts what belongs to a snapshot that came, or went.
    pub(super) fn list(&mut self, id: &SnapshotId, is_listed: bool) -> Result<(), StoreError> {
        let mut keys: HashSet<ObjectKey> = HashSet::from([id.key()]);
        let mut prefix = vec![EVENT];
        prefix.extend_from_slice(id.as_bytes());
        self.each_row(&prefix, |row, _| {
            let key = row[prefix.len()..].try_into().map_err(|_| StoreError::Ledger)?;
            keys.insert(ObjectKey(key));
            Ok(())
        })?;
        keys.extend(self.fresh_events.get(id).into_iter().flatten());
        keys.into_iter().try_for_each(|key| self.count_once(key, is_listed))
    }

    /// Forgets events that go with a pack. The pack is about to be retired.
    pub(crate) fn forget_events(&mut self, pack: PackId) -> Result<(), StoreError> {
        for (event, key, place) in self.events_in(pack)? {
            let is_last = self.depot.place(key)? == Some(place);
            if is_last && !self.roots.snapshots.contains(&event.snapshot) {
                self.changes.push((event_row(&event.snapshot, key), None));
            }
        }
        self.forget_copies_in(pack)?;
        self.packs.remove(&pack);
        self.live.remove(&pack);
        self.touched.remove(&pack);
        Ok(())
    }
}
