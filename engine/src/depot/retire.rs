//! Retiring packs: first the index forgets them, durably, then their files
//! go. A power cut between the two leaves a pack without a mark, which is
//! published again at the next opening and collected again by a later run.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::Ordering;

use super::Depot;
use super::copies::Copies;
use crate::env::lock;
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::index::{Place, rows};
use crate::pack::{Directory, EntryNo, FrameKind};
use crate::units::{PACKS_DIR, QUARANTINE_DIR, to_usize};

/// Dead keys of packs that retire together are held in memory at once up to
/// about this many.
const KEYS_MAX: usize = 1 << 21;

/// What becomes of the file of a retired pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disposal {
    /// It goes.
    Remove,
    /// It is moved out of the way.
    Quarantine,
}

/// Who gets the objects of dying packs.
struct Heirs {
    places: HashMap<ObjectKey, Option<Place>>,
    /// The objects that the index finds in each pack, where its tables do not
    /// tell them because they are damaged.
    found: BTreeMap<PackId, Vec<ObjectKey>>,
    /// Packs that were asked.
    looked: BTreeSet<PackId>,
    disposal: Disposal,
}

impl Depot {
    /// Retires packs. A pack to be removed holds nothing that is needed and
    /// that the index finds there; of others, what other packs have too is
    /// found in those from then on. Calls `retired` for each with the length of its file.
    pub(crate) fn retire(
        &self,
        packs: &[PackId],
        disposal: Disposal,
        retired: &mut dyn FnMut(PackId, u64),
    ) -> Result<(), StoreError> {
        let mut at = 0;
        while at < packs.len() {
            let mut keys = 0;
            let start = at;
            while at < packs.len() && (at == start || keys < KEYS_MAX) {
                keys += self.keys_of_dying(packs[at], disposal)?.len();
                at += 1;
            }
            self.retire_group(&packs[start..at], disposal, retired)?;
        }
        Ok(())
    }

    fn retire_group(
        &self,
        packs: &[PackId],
        disposal: Disposal,
        retired: &mut dyn FnMut(PackId, u64),
    ) -> Result<(), StoreError> {
        if disposal == Disposal::Quarantine {
            // What is needed is found elsewhere from now on.
            self.index.put_rows(self.index.generation(), &[(vec![rows::VALID], None)])?;
        }
        let dying: BTreeSet<PackId> = packs.iter().copied().collect();
        let copies = Copies::of(&*self.index, &dying)?;
        let mut heirs = self.heirs(&dying, copies.as_ref(), disposal)?;
        for pack in packs {
            let len = self.forget_pack(*pack, &dying, &mut heirs)?;
            self.dispose(*pack, disposal)?;
            retired(*pack, len);
        }
        if let Some(copies) = copies {
            copies.forget(&*self.index, &dying)?;
        }
        // A name that came back would only be a pack to collect again, but a
        // disk that cannot flush is not to be trusted with more writes.
        self.disk.sync_dir(PACKS_DIR).map_err(|error| {
            self.fence();
            StoreError::io("flush", PACKS_DIR)(error)
        })
    }

    fn dispose(&self, pack: PackId, disposal: Disposal) -> Result<(), StoreError> {
        let path = pack.path();
        if disposal == Disposal::Remove {
            return self.disk.remove(&path).map_err(StoreError::io("remove", &path));
        }
        let aside = format!("{QUARANTINE_DIR}/{pack}.pack");
        self.disk.make_dir(QUARANTINE_DIR).map_err(StoreError::io("create", QUARANTINE_DIR))?;
        match self.disk.rename(&path, &aside) {
            // It was gone already, which is what was wrong with it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            moved => moved.map_err(StoreError::io("rename to", &aside))?,
        }
        // Also the name of the folder itself.
        for dir in [QUARANTINE_DIR, ""] {
            self.disk.sync_dir(dir).map_err(|error| {
                self.fence();
                StoreError::io("flush", QUARANTINE_DIR)(error)
            })?;
        }
        Ok(())
    }

    /// Where else the objects of dying packs lie: the index names an object
    /// in the youngest pack that has it, so that one of the others inherits.
    /// Nobody who is listed needs what dies, but an open session may rely on
    /// an older copy.
    fn heirs(
        &self,
        dying: &BTreeSet<PackId>,
        copies: Option<&Copies>,
        disposal: Disposal,
    ) -> Result<Heirs, StoreError> {
        let found = match disposal {
            Disposal::Remove => BTreeMap::new(),
            Disposal::Quarantine => self.found_in(dying)?,
        };
        let (places, looked) = (HashMap::new(), BTreeSet::new());
        let mut heirs = Heirs { places, found, looked, disposal };
        for pack in dying {
            let listed = self.keys_of_dying(*pack, disposal)?;
            let keys = listed.iter().chain(heirs.found.get(pack).into_iter().flatten());
            heirs.places.extend(keys.map(|key| (*key, None)));
        }
        let kept = self.packs().into_iter().map(|(pack, _)| pack);
        for pack in kept.filter(|pack| copies.is_none_or(|copies| copies.older.contains(pack))) {
            self.look(pack, dying, &mut heirs)?;
        }
        Ok(heirs)
    }

    /// Lets a pack inherit what it has of the dying ones.
    fn look(
        &self,
        pack: PackId,
        dying: &BTreeSet<PackId>,
        heirs: &mut Heirs,
    ) -> Result<(), StoreError> {
        if dying.contains(&pack) || !heirs.looked.insert(pack) {
            return Ok(());
        }
        let directory = match self.directory(pack) {
            // It is damaged too: what it has is found by repairing it.
            Err(_) if heirs.disposal == Disposal::Quarantine => return Ok(()),
            directory => directory?,
        };
        for (key, entry) in directory.keys.iter().zip(0..) {
            if let Some(heir) = heirs.places.get_mut(key) {
                let place = Place { pack, entry: EntryNo(entry) };
                *heir = Some(heir.map_or(place, |other| other.max(place)));
            }
        }
        Ok(())
    }

    /// Takes a pack out of the index. Returns the length of its file.
    fn forget_pack(
        &self,
        pack: PackId,
        dying: &BTreeSet<PackId>,
        heirs: &mut Heirs,
    ) -> Result<u64, StoreError> {
        let listed = self.keys_of_dying(pack, heirs.disposal)?;
        let mut keys: Vec<ObjectKey> = heirs.found.remove(&pack).unwrap_or_default();
        keys.extend(&listed);
        keys.sort_unstable();
        keys.dedup();
        let publishing = lock(&self.publishing);
        self.check_fence()?;
        // An older pack with a copy may have been published just now.
        if let Some(copies) = Copies::of(&*self.index, dying)? {
            for older in self.packs().into_iter().map(|(pack, _)| pack) {
                if copies.older.contains(&older) {
                    self.look(older, dying, heirs)?;
                }
            }
        }
        let places = self.index.get_many(&keys)?;
        let moves: Vec<(ObjectKey, Option<Place>)> = keys
            .iter()
            .zip(places)
            .filter(|(_, place)| place.is_some_and(|place| place.pack == pack))
            .map(|(key, _)| (*key, heirs.places.get(key).copied().flatten()))
            .collect();
        self.index.retire(pack, &moves)?;
        let summary = lock(&self.packs).remove(&pack);
        self.retirements.fetch_add(1, Ordering::AcqRel);
        drop(publishing);
        match self.directory(pack) {
            Ok(directory) if heirs.disposal == Disposal::Remove => {
                self.forget_hints_of(&directory, &moves);
            }
            // Whose keys are those of nodes is not known.
            _ => self.forget_all_hints()?,
        }
        lock(&self.files).remove(&pack);
        lock(&self.directories).remove(&pack);
        Ok(summary.map_or(0, |summary| summary.file_len))
    }

    /// The objects that the tables of a dying pack tell. One that is put aside
    /// may have none that can be read.
    fn keys_of_dying(
        &self,
        pack: PackId,
        disposal: Disposal,
    ) -> Result<Vec<ObjectKey>, StoreError> {
        match self.directory(pack) {
            Err(_) if disposal == Disposal::Quarantine => Ok(Vec::new()),
            directory => Ok(directory?.keys.clone()),
        }
    }

    /// The objects that the index finds in these packs, whatever their tables
    /// say: one visit of all its entries.
    fn found_in(
        &self,
        packs: &BTreeSet<PackId>,
    ) -> Result<BTreeMap<PackId, Vec<ObjectKey>>, StoreError> {
        let mut found: BTreeMap<PackId, Vec<ObjectKey>> = BTreeMap::new();
        self.index.for_each(&mut |key, place| {
            if packs.contains(&place.pack) {
                found.entry(place.pack).or_default().push(key);
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// A node that is in no pack any more needs no hint.
    fn forget_hints_of(&self, directory: &Directory, moves: &[(ObjectKey, Option<Place>)]) {
        let dead: HashSet<ObjectKey> =
            moves.iter().filter(|(_, heir)| heir.is_none()).map(|(key, _)| *key).collect();
        let objects = directory.frames.iter().filter(|frame| frame.kind == FrameKind::Objects);
        let keys = objects.flat_map(|frame| {
            let first = to_usize(u64::from(frame.first.0));
            &directory.keys[first..first + to_usize(u64::from(frame.count))]
        });
        let keys: Vec<ObjectKey> = keys.filter(|key| dead.contains(key)).copied().collect();
        self.forget_hints(&keys);
    }

    /// Counts retired packs, so that whoever remembers places notices.
    pub(crate) fn retirements(&self) -> u64 {
        self.retirements.load(Ordering::Acquire)
    }

    /// Does something again that came upon a pack which was retired between
    /// finding its place and opening it.
    pub(crate) fn following<T>(
        &self,
        mut work: impl FnMut() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        loop {
            let before = self.retirements();
            match work() {
                Err(StoreError::Retired { .. }) if self.retirements() != before => {}
                done => return done,
            }
        }
    }
}
