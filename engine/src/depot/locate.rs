//! Finding many objects: what is read in order was mostly written in order,
//! so the neighbour of the last find is tried before the index.

use std::collections::HashMap;
use std::sync::Arc;

use super::Depot;
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::index::Place;
use crate::pack::{Directory, EntryNo, FrameSpan};
use crate::units::{to_u32, to_usize};

/// Packs whose position is remembered.
const CURSORS_MAX: usize = 8;
/// How many neighbours are compared.
const WINDOW: usize = 32;
/// Finds in one pack and batch from which on its directory is worth loading.
const WORTH_LOADING: usize = 8;

/// Where an object's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) pack: PackId,
    pub(crate) span: FrameSpan,
    /// Its number among the objects of the frame.
    pub(crate) slot: u32,
}

#[derive(Debug)]
struct Cursor {
    pack: PackId,
    directory: Arc<Directory>,
    next: usize,
}

/// Remembers where the last objects were found.
#[derive(Debug)]
pub(crate) struct Locator<'d> {
    depot: &'d Depot,
    state: LocatorState,
}

/// What a locator remembers between its uses.
#[derive(Debug, Default)]
pub(crate) struct LocatorState {
    cursors: Vec<Cursor>,
    /// Packs condemned and retired when the cursors were last known to be good.
    seen: (u64, u64),
}

impl<'d> Locator<'d> {
    pub(crate) fn new(depot: &'d Depot) -> Self {
        Self { depot, state: LocatorState::default() }
    }

    /// Finds objects, in the order of the keys.
    pub(crate) fn find(&mut self, keys: &[ObjectKey]) -> Result<Vec<Option<Place>>, StoreError> {
        self.state.find(self.depot, keys)
    }

    /// Finds objects down to their frames.
    pub(crate) fn locate(
        &mut self,
        keys: &[ObjectKey],
    ) -> Result<Vec<Option<Location>>, StoreError> {
        let places = self.find(keys)?;
        places.into_iter().map(|place| place.map_or(Ok(None), |p| self.depot.location(p))).collect()
    }
}

impl LocatorState {
    /// Finds objects, in the order of the keys.
    pub(crate) fn find(
        &mut self,
        depot: &Depot,
        keys: &[ObjectKey],
    ) -> Result<Vec<Option<Place>>, StoreError> {
        let now = (depot.pins.condemnations(), depot.retirements());
        if std::mem::replace(&mut self.seen, now) != now {
            self.cursors.clear();
        }
        let mut found: Vec<Option<Place>> = keys.iter().map(|key| self.neighbour(key)).collect();
        let missed: Vec<usize> = (0..keys.len()).filter(|at| found[*at].is_none()).collect();
        if missed.is_empty() {
            return Ok(found);
        }
        let missed_keys: Vec<ObjectKey> = missed.iter().map(|at| keys[*at]).collect();
        let places = depot.ask_index(&missed_keys)?;
        self.follow(depot, &places)?;
        for (at, place) in missed.into_iter().zip(places) {
            found[at] = place;
        }
        Ok(found)
    }

    fn neighbour(&mut self, key: &ObjectKey) -> Option<Place> {
        for at in (0..self.cursors.len()).rev() {
            let cursor = &mut self.cursors[at];
            let window = cursor.directory.keys.get(cursor.next..)?;
            let Some(step) = window.iter().take(WINDOW).position(|other| other == key) else {
                continue;
            };
            let entry = EntryNo(to_u32(cursor.next + step));
            cursor.next += step + 1;
            let pack = cursor.pack;
            // The pack found last is asked first.
            let last = self.cursors.len() - 1;
            self.cursors.swap(at, last);
            return Some(Place { pack, entry });
        }
        None
    }

    /// Puts cursors behind the last finds in packs that were hit often.
    fn follow(&mut self, depot: &Depot, places: &[Option<Place>]) -> Result<(), StoreError> {
        let mut hits: HashMap<PackId, (usize, usize)> = HashMap::new();
        for place in places.iter().flatten() {
            let next = to_usize(u64::from(place.entry.0)) + 1;
            let hit = hits.entry(place.pack).or_insert((0, next));
            *hit = (hit.0 + 1, next);
        }
        for (pack, (count, next)) in hits {
            if let Some(cursor) = self.cursors.iter_mut().find(|cursor| cursor.pack == pack) {
                cursor.next = next;
            } else if count >= WORTH_LOADING {
                if self.cursors.len() == CURSORS_MAX {
                    self.cursors.remove(0);
                }
                match depot.directory(pack) {
                    Ok(directory) => self.cursors.push(Cursor { pack, directory, next }),
                    Err(StoreError::Retired { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

impl Depot {
    /// The frame and slot of a place; `None` if its pack does not have it.
    pub(crate) fn location(&self, place: Place) -> Result<Option<Location>, StoreError> {
        let directory = self.directory(place.pack)?;
        let found = directory.find(place.entry);
        Ok(found.map(|(span, slot)| Location { pack: place.pack, span, slot }))
    }
}
