//! Pins: what may not be collected, because somebody uses it now.
//!
//! One lock decides three things together: which packs are condemned, which
//! packs open sessions rely on, and which images are leased. A pack that a
//! session relies on is never condemned, and a session never comes to rely on
//! a condemned pack, because it treats what lies there as missing. Pins live
//! as long as the depot does: whoever holds one ends with the process that
//! owns the store.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::Depot;
use crate::env::lock;
use crate::id::PackId;
use crate::index::Place;
use crate::tree::ImageRef;

/// All pins of a depot.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    state: Mutex<State>,
    /// Counts condemnations, so that whoever remembers places notices.
    condemnations: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    next_session: u64,
    /// The packs that each open session relies on.
    sessions: HashMap<u64, HashSet<PackId>>,
    /// Ids are never used twice, so those of packs that are gone may stay.
    condemned: HashSet<PackId>,
    /// How many leases each image has.
    leases: HashMap<ImageRef, u64>,
}

/// What one session relies on, until it is dropped.
#[derive(Debug)]
pub(crate) struct SessionPins {
    depot: Arc<Depot>,
    session: u64,
    /// Packs of its own that are published.
    published: AtomicU64,
}

impl Pins {
    /// Condemns those packs that no session relies on, and reads at the same
    /// instant which images are leased and what `listed` says.
    pub(crate) fn condemn<T>(
        &self,
        packs: &BTreeSet<PackId>,
        listed: impl FnOnce() -> T,
    ) -> (BTreeSet<PackId>, Vec<ImageRef>, T) {
        let mut state = lock(&self.state);
        let free = |pack: &&PackId| !state.sessions.values().any(|held| held.contains(*pack));
        let condemned: BTreeSet<PackId> = packs.iter().filter(free).copied().collect();
        state.condemned.extend(&condemned);
        if !condemned.is_empty() {
            self.condemnations.fetch_add(1, Ordering::AcqRel);
        }
        (condemned, state.leases.keys().copied().collect(), listed())
    }

    /// Takes packs back into use that were not collected after all.
    pub(crate) fn pardon(&self, packs: &BTreeSet<PackId>) {
        let mut state = lock(&self.state);
        packs.iter().for_each(|pack| {
            state.condemned.remove(pack);
        });
    }

    /// The packs of those given that sessions rely on.
    pub(crate) fn relied_on(&self) -> BTreeSet<PackId> {
        lock(&self.state).sessions.values().flatten().copied().collect()
    }

    /// How often packs were condemned.
    pub(crate) fn condemnations(&self) -> u64 {
        self.condemnations.load(Ordering::Acquire)
    }

    /// Leases images that are leased already or listed now; if one is
    /// neither, it is returned and nothing is leased.
    pub(crate) fn lease(
        &self,
        images: &[ImageRef],
        is_listed: impl Fn(&ImageRef) -> bool,
    ) -> Result<(), ImageRef> {
        let mut state = lock(&self.state);
        let lost =
            images.iter().find(|image| !state.leases.contains_key(*image) && !is_listed(image));
        if let Some(lost) = lost {
            return Err(*lost);
        }
        images.iter().for_each(|image| *state.leases.entry(*image).or_insert(0) += 1);
        Ok(())
    }

    /// Ends leases.
    pub(crate) fn release(&self, images: &[ImageRef]) {
        let mut state = lock(&self.state);
        for image in images {
            if let Some(count) = state.leases.get_mut(image) {
                *count -= 1;
                if *count == 0 {
                    state.leases.remove(image);
                }
            }
        }
    }
}

impl SessionPins {
    /// Begins a session that relies on nothing yet.
    pub(crate) fn begin(depot: Arc<Depot>) -> Self {
        let mut state = lock(&depot.pins.state);
        state.next_session += 1;
        let session = state.next_session;
        state.sessions.insert(session, HashSet::new());
        drop(state);
        Self { depot, session, published: AtomicU64::new(0) }
    }

    /// Relies on what was found; what lies in condemned packs counts as not
    /// found.
    pub(crate) fn claim(&self, found: &mut [Option<Place>]) {
        let mut state = lock(&self.depot.pins.state);
        let State { sessions, condemned, .. } = &mut *state;
        let Some(held) = sessions.get_mut(&self.session) else { return };
        let mut last = None;
        for place in found {
            let Some(pack) = place.map(|place| place.pack) else { continue };
            if condemned.contains(&pack) {
                *place = None;
            } else if last != Some(pack) {
                held.insert(pack);
                last = Some(pack);
            }
        }
    }

    /// How many packs of the session are published.
    pub(super) fn published(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    /// Counts a pack of the session that is published, before all publications
    /// are counted.
    pub(super) fn count_published(&self) {
        self.published.fetch_add(1, Ordering::AcqRel);
    }

    /// Relies on a pack that the session itself is about to publish.
    pub(crate) fn own(&self, pack: PackId) {
        if let Some(held) = lock(&self.depot.pins.state).sessions.get_mut(&self.session) {
            held.insert(pack);
        }
    }
}

impl Drop for SessionPins {
    fn drop(&mut self) {
        lock(&self.depot.pins.state).sessions.remove(&self.session);
    }
}
