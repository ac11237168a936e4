//! The history as the packs tell it, for a store whose root log is lost.
//! Removals are not in packs, so what was removed comes back, unless a part
//! of it was collected.

use std::collections::{HashMap, HashSet};

use super::{Event, EventKind, LoggedEvent, SnapshotRecord};
use crate::depot::Depot;
use crate::error::{FormatError, StoreError};
use crate::id::{PackId, SnapshotId};
use crate::pack::{Frame, FrameKind, ObjectKind, object};

/// All events in packs, in the order of the packs.
pub(super) fn events_in_packs(depot: &Depot) -> Result<Vec<LoggedEvent>, StoreError> {
    let mut found = Found::default();
    for (pack, summary) in depot.packs() {
        found.read_pack(depot, pack, summary.file_len)?;
    }
    found.drop_collected(depot)?;
    Ok(found.into_events())
}

#[derive(Debug, Default)]
struct Found {
    records: HashMap<SnapshotId, SnapshotRecord>,
    events: Vec<(PackId, u64, Event)>,
}

impl Found {
    fn read_pack(&mut self, depot: &Depot, pack: PackId, len: u64) -> Result<(), StoreError> {
        let directory = depot.directory(pack)?;
        for span in directory.frames.iter().filter(|span| span.kind == FrameKind::Catalog) {
            let frame = match depot.frame(pack, span) {
                Ok(frame) => frame,
                Err(error @ StoreError::Damaged { .. }) => {
                    tracing::warn!(%error, "part of the catalog's history is lost");
                    continue;
                }
                Err(error) => return Err(error),
            };
            if let Err(source) = self.read_frame(&frame, pack, len) {
                // A pack that somebody made up is no reason not to open.
                let error = StoreError::Damaged { pack, offset: span.offset, source };
                tracing::warn!(%error, "part of the catalog's history is lost");
            }
        }
        Ok(())
    }

    fn read_frame(&mut self, frame: &Frame, pack: PackId, len: u64) -> Result<(), FormatError> {
        for object in object::list(frame)? {
            match object.kind {
                ObjectKind::Snapshot => {
                    let record = SnapshotRecord::decode(object.bytes)?;
                    self.records.insert(SnapshotId::of(object.bytes), record);
                }
                ObjectKind::Event => self.events.push((pack, len, Event::decode(object.bytes)?)),
                ObjectKind::Node | ObjectKind::NodePatch | ObjectKind::Root => {}
            }
        }
        Ok(())
    }

    /// Leaves out snapshots that were removed and of which a part has been
    /// collected since.
    fn drop_collected(&mut self, depot: &Depot) -> Result<(), StoreError> {
        let mut nodes = HashSet::new();
        let mut collected = Vec::new();
        for (id, record) in &self.records {
            for (_, image) in &record.images {
                if !depot.is_whole(image, &mut nodes)? {
                    tracing::warn!(%id, "a snapshot is left out: parts of it are in no pack");
                    collected.push(*id);
                    break;
                }
            }
        }
        for id in collected {
            self.records.remove(&id);
        }
        // A repacked event lies in a young pack; its time says when it was. What
        // names a snapshot came behind its commit, also in the same instant.
        self.events.sort_by_key(|(pack, _, event)| {
            (event.time_unix_ms, event.kind != EventKind::Commit, *pack)
        });
        Ok(())
    }

    fn into_events(self) -> Vec<LoggedEvent> {
        let records = self.records;
        let with_record = |(pack, stored_bytes, event): (PackId, u64, Event)| {
            let record = records.get(&event.snapshot).cloned();
            LoggedEvent { event, record, pack, stored_bytes }
        };
        self.events.into_iter().map(with_record).collect()
    }
}
