//! Objects that moved: they are found in a younger pack than before, so their
//! bits follow. A node may be stored otherwise there.

use super::Ledger;
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::index::Place;
use crate::index::rows::{MOVED, place_from, place_of};
use crate::pack::FrameKind;

impl Ledger<'_> {
    /// Lets the bits of all objects that moved follow them.
    pub(crate) fn settle(&mut self) -> Result<(), StoreError> {
        // Whatever is published from now on tells its moves later.
        let packs: Vec<PackId> = self.depot.packs().into_iter().map(|(pack, _)| pack).collect();
        let mut moves: Vec<(Place, Place)> = Vec::new();
        let mut seen = Vec::new();
        self.each_row(&[MOVED], |key, value| {
            let new = place_of(&key).ok_or(StoreError::Ledger)?;
            // A pack that is just being published is not among the packs yet.
            if packs.binary_search(&new.pack).is_ok() {
                moves.push((new, place_from(&value).ok_or(StoreError::Ledger)?));
                seen.push((key, None));
            }
            Ok(())
        })?;
        self.changes.extend(seen);
        self.learn_copies()?;
        let mut nodes = Vec::new();
        for (new, before) in &moves {
            if self.follow_move(*before, *new)? {
                nodes.push(*new);
            }
        }
        self.settled = packs.into_iter().collect();
        for (new, before) in moves {
            let key = self.depot.directory(new.pack)?.key(new.entry).ok_or(StoreError::Ledger)?;
            self.add_copy(key, before)?;
            self.spill()?;
        }
        nodes.into_iter().try_for_each(|place| self.restate(place))
    }

    /// Says whether a needed object moved that may be a node.
    fn follow_move(&mut self, before: Place, new: Place) -> Result<bool, StoreError> {
        if self.is_live(new)? || !self.is_live(before)? {
            return Ok(false);
        }
        self.set_live(before, false)?;
        self.set_live(new, true)?;
        let directory = self.depot.directory(new.pack)?;
        let key = directory.key(new.entry).ok_or(StoreError::Ledger)?;
        self.held.entry(key).and_modify(|held| held.at = Some(new));
        let span = directory.find(new.entry).map(|(span, _)| span.kind);
        Ok(span == Some(FrameKind::Objects))
    }

    /// Notes how a node that moved is stored now.
    fn restate(&mut self, place: Place) -> Result<(), StoreError> {
        let key: Option<ObjectKey> = self.depot.directory(place.pack)?.key(place.entry);
        let (Some(key), Some(patch_of)) = (key, self.depot.form_at(place)?) else {
            return Ok(());
        };
        self.effort.nodes_read += 1;
        self.patched(key, patch_of)
    }
}
