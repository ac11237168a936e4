//! Novelty: whether a pack that is about to be published has anything that the
//! index has already. If not, its objects need not be looked up once more.
//!
//! Invariant: a pack counts as new only if each of its objects was looked for
//! in the index in vain, and since before the first of these look-ups nobody
//! else published anything and the index did not go back. What a session
//! itself published it remembers until the index has it, so it cannot come
//! again either.

use super::{Depot, SessionPins};

/// What was published when objects were looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Novelty {
    /// Packs that others than the session published, or fewer.
    others: u64,
    generation: u64,
}

impl Novelty {
    /// As of now; taken before the look-ups that it is for.
    pub(crate) fn begin(depot: &Depot, session: &SessionPins) -> Self {
        // In this order: a pack that the session publishes in between makes
        // the number too small, and then the pack counts as not new.
        let all = depot.publications();
        let own = session.published();
        Self { others: all.saturating_sub(own), generation: depot.index().generation() }
    }

    /// The generation of the index for which a pack is new, if it is. Only
    /// while nothing is being published.
    pub(super) fn still(self, depot: &Depot, session: &SessionPins) -> Option<u64> {
        (Self::begin(depot, session) == self).then_some(self.generation)
    }
}
