//! The catalog: which snapshots exist and what they are called.
//!
//! Its truth is the root log; every event also lies in a pack, so a lost log
//! is written again from the packs.

mod event;
mod log;
mod record;
mod restore;
mod state;

use std::collections::HashSet;
use std::sync::Mutex;

pub use record::{Role, SnapshotRecord};
pub use state::Entry;

#[cfg(test)]
pub(crate) use event::tests::sample as sample_event;
pub(crate) use event::{Event, EventKind};
use log::RootLog;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use log::{decode_any as decode_log_entry, decode_whole as decode_log};
use state::State;

use crate::depot::Depot;
use crate::env::lock;
use crate::error::StoreError;
use crate::id::{Name, PackId};
use crate::io::Disk;
use crate::tree::ImageRef;

/// The snapshots of a store.
///
/// Who changes something holds the log from the question whether it may to the
/// end; who only looks never waits for the disk.
#[derive(Debug)]
pub(crate) struct Catalog {
    log: Mutex<Log>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
enum Log {
    Open(RootLog),
    /// Only looked at.
    Seen,
}

#[derive(Debug)]
struct Inner {
    /// Bytes of the root log.
    log_len: u64,
    state: State,
    /// Names that commits under way are about to take.
    reserved: HashSet<Name>,
    /// The highest pack id that the log carries.
    logged: PackId,
}

/// Keeps a name from being taken by others until it is dropped.
#[derive(Debug)]
pub(crate) struct NameGuard<'c> {
    catalog: &'c Catalog,
    name: Option<Name>,
}

impl Drop for NameGuard<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            lock(&self.catalog.inner).reserved.remove(name);
        }
    }
}

/// An event with what only the root log keeps about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LoggedEvent {
    pub(crate) event: Event,
    /// The record of the snapshot that a commit is about.
    pub(crate) record: Option<SnapshotRecord>,
    /// The highest pack id in use.
    pub(crate) pack: PackId,
    /// Bytes that the commit added to packs.
    pub(crate) stored_bytes: u64,
}

impl Catalog {
    /// Reads the root log, or writes it again if it is lost.
    pub(crate) fn open(depot: &Depot) -> Result<Self, StoreError> {
        let mut state = State::default();
        let mut highest = PackId(0);
        let mut replay = |logged: LoggedEvent| {
            highest = highest.max(logged.pack);
            depot.reserve_ids_through(logged.pack);
            state.apply(&logged);
        };
        let log = match RootLog::open(depot.disk(), &mut replay)? {
            Some(log) => log,
            None => {
                // A log without what they tell would be taken for the truth.
                if let Some(pack) = depot.unreadable().into_keys().next() {
                    let source = std::io::Error::other("the root log is written from it");
                    return Err(StoreError::io("read", &pack.path())(source));
                }
                depot.skip_lost_ids();
                let events = restore::events_in_packs(depot)?;
                let log = RootLog::create(depot.disk(), &events)?;
                events.into_iter().for_each(replay);
                log
            }
        };
        let len = log.len();
        Ok(Self::of(Log::Open(log), len, state, highest))
    }

    /// The highest pack id that the log carries.
    pub(crate) fn carried_id(&self) -> PackId {
        lock(&self.inner).logged
    }

    /// Makes the log carry all pack ids given out so far, so that none is
    /// given out again when its pack is gone.
    pub(crate) fn carry_ids(&self, depot: &Depot, time_unix_ms: u64) -> Result<(), StoreError> {
        let pack = depot.highest_pack();
        if pack <= lock(&self.inner).logged {
            return Ok(());
        }
        let event = Event::nothing(time_unix_ms);
        self.append(depot, &LoggedEvent { event, record: None, pack, stored_bytes: 0 })
    }

    /// Reads the root log as it is now, without writing anything. `None` if
    /// there is none.
    pub(crate) fn look(disk: &dyn Disk) -> Result<Option<Self>, StoreError> {
        let mut state = State::default();
        let len = RootLog::look(disk, &mut |logged| state.apply(&logged))?;
        Ok(len.map(|len| Self::of(Log::Seen, len, state, PackId(0))))
    }

    /// What the packs tell where there is no root log, without writing one.
    pub(crate) fn look_in_packs(depot: &Depot) -> Result<Self, StoreError> {
        let mut state = State::default();
        restore::events_in_packs(depot)?.iter().for_each(|logged| state.apply(logged));
        Ok(Self::of(Log::Seen, 0, state, PackId(0)))
    }

    fn of(log: Log, log_len: u64, state: State, logged: PackId) -> Self {
        let inner = Inner { log_len, state, reserved: HashSet::new(), logged };
        Self { log: Mutex::new(log), inner: Mutex::new(inner) }
    }

    /// Takes a free name for a commit that is under way.
    pub(crate) fn reserve(&self, name: Option<&Name>) -> Result<NameGuard<'_>, StoreError> {
        let mut inner = lock(&self.inner);
        if let Some(name) = name {
            if inner.state.has_name(name) || inner.reserved.contains(name) {
                return Err(StoreError::NameExists(name.clone()));
            }
            inner.reserved.insert(name.clone());
        }
        Ok(NameGuard { catalog: self, name: name.cloned() })
    }

    /// Makes an event durable and then visible. An event about a snapshot that
    /// is not listed is refused, unless it is what lists it.
    pub(crate) fn append(&self, depot: &Depot, logged: &LoggedEvent) -> Result<(), StoreError> {
        self.append_if(depot, |state| {
            let event = &logged.event;
            if event.kind == EventKind::Tag && state.get(&event.snapshot).is_none() {
                return Err(StoreError::NotFound(event.snapshot.to_string()));
            }
            Ok((logged.clone(), ()))
        })
    }

    /// Takes a name away, or by its id a snapshot that has none. Returns what
    /// the snapshot was.
    pub(crate) fn remove(
        &self,
        depot: &Depot,
        name_or_id: &str,
        time_unix_ms: u64,
    ) -> Result<Entry, StoreError> {
        self.append_if(depot, |state| {
            let entry = state.lookup(name_or_id)?;
            let event = Event::removal(&entry, name_or_id, time_unix_ms)?;
            let pack = depot.highest_pack();
            Ok((LoggedEvent { event, record: None, pack, stored_bytes: 0 }, entry))
        })
    }

    /// Appends what `decide` makes of the catalog as it is, while nobody else
    /// changes it.
    fn append_if<T>(
        &self,
        depot: &Depot,
        decide: impl FnOnce(&State) -> Result<(LoggedEvent, T), StoreError>,
    ) -> Result<T, StoreError> {
        let mut log = lock(&self.log);
        let (logged, told) = decide(&lock(&self.inner).state)?;
        depot.check_fence()?;
        let Log::Open(log) = &mut *log else { return Err(StoreError::ReadOnly) };
        if let Err(failure) = log.append(&logged) {
            if failure.must_fence {
                depot.fence();
            }
            return Err(failure.error);
        }
        let mut inner = lock(&self.inner);
        inner.state.apply(&logged);
        inner.logged = inner.logged.max(logged.pack);
        inner.log_len = log.len();
        Ok(told)
    }

    /// All snapshots, oldest first.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        lock(&self.inner).state.entries()
    }

    /// The snapshot with this name, this id, or the only one whose id begins
    /// like this.
    pub(crate) fn lookup(&self, text: &str) -> Result<Entry, StoreError> {
        lock(&self.inner).state.lookup(text)
    }

    /// Whether a listed snapshot has this image.
    pub(crate) fn lists(&self, image: &ImageRef) -> bool {
        lock(&self.inner).state.lists(image)
    }

    /// Bytes of the root log.
    pub(crate) fn log_len(&self) -> u64 {
        lock(&self.inner).log_len
    }
}
