//! The ledger against the full mark, over random histories.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use super::{Ledger, Roots, mark};
use crate::catalog::{Role, SnapshotRecord};
use crate::gc::GcOptions;
use crate::id::NodeId;
use crate::index::rows::{COUNT, VALID, of_object};
use crate::ingest::CommitOptions;
use crate::io::SimDisk;
use crate::lease::Lease;
use crate::settings::{IndexKind, Settings};
use crate::store::Store;
use crate::tree::ImageRef;
use crate::units::PAGE_LEN;

#[derive(Debug, Clone)]
enum Act {
    /// An image on one made before, or on none, committed.
    Make(Option<prop::sample::Index>, Vec<(u16, u8)>),
    /// Two sessions that store the same pages at once; one may give up.
    Twins(Vec<(u16, u8)>, bool),
    Tag(prop::sample::Index),
    Remove(prop::sample::Index),
    Lease(prop::sample::Index),
    Release,
    Collect(u8),
    Count,
    /// With the index in memory everything is counted anew.
    Reopen,
}

fn act() -> impl Strategy<Value = Act> {
    let pages = || prop::collection::vec((0..400_u16, 0..9_u8), 1..40);
    prop_oneof![
        5 => (any::<Option<prop::sample::Index>>(), pages()).prop_map(|(base, pages)| Act::Make(base, pages)),
        2 => (pages(), any::<bool>()).prop_map(|(pages, both)| Act::Twins(pages, both)),
        1 => any::<prop::sample::Index>().prop_map(Act::Tag),
        3 => any::<prop::sample::Index>().prop_map(Act::Remove),
        1 => any::<prop::sample::Index>().prop_map(Act::Lease),
        1 => Just(Act::Release),
        2 => prop_oneof![Just(0_u8), Just(30), Just(100)].prop_map(Act::Collect),
        3 => Just(Act::Count),
        1 => Just(Act::Reopen),
    ]
}

/// A store, and what to do with it.
struct World {
    disk: SimDisk,
    settings: Settings,
    store: Store,
    images: Vec<ImageRef>,
    leases: Vec<Lease>,
    names: u32,
}

fn open(disk: &SimDisk, settings: &Settings) -> Store {
    Store::open_on(Arc::new(disk.clone()), settings).expect("it opens")
}

impl World {
    fn new() -> Self {
        let disk = SimDisk::new();
        let settings =
            Settings { index: IndexKind::Memory, pack_objects_max: 50, ..Settings::default() };
        let store = open(&disk, &settings);
        Self { disk, settings, store, images: Vec::new(), leases: Vec::new(), names: 0 }
    }

    fn listed(&self) -> Vec<ImageRef> {
        let entries = self.store.snapshots();
        entries.iter().filter_map(|entry| entry.record.image(Role::Memory).copied()).collect()
    }

    fn next_name(&mut self) -> Option<crate::id::Name> {
        self.names += 1;
        format!("s{}", self.names).parse().ok()
    }

    fn make(&mut self, base: Option<ImageRef>, pages: &[(u16, u8)]) {
        let mut session = self.store.begin().expect("a session");
        let image = write(&mut session, base, pages);
        let bytes: Vec<u8> = pages.iter().flat_map(|(_, content)| [*content; 3000]).collect();
        let mut stream = session.stream();
        stream.append(&bytes).expect("a stream");
        let stream = stream.finish().expect("a stream");
        let name = self.next_name();
        commit_both(session, image, Some(stream), name);
        self.images.push(image);
    }

    fn twins(&mut self, pages: &[(u16, u8)], both: bool) {
        let base = self.listed().first().copied();
        let mut one = self.store.begin().expect("a session");
        let mut other = self.store.begin().expect("a session");
        let image = write(&mut one, None, pages);
        // The other one may store the same nodes as patches.
        write(&mut other, base, pages);
        let same = write(&mut other, None, pages);
        let (name, other_name) = (self.next_name(), self.next_name());
        commit(one, image, name);
        if both {
            commit(other, same, other_name);
        }
    }

    fn names(&self) -> Vec<String> {
        let entries = self.store.snapshots();
        entries.iter().flat_map(|entry| entry.names.iter().map(ToString::to_string)).collect()
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Make(base, pages) => {
                let listed = self.listed();
                let base = base.filter(|_| !listed.is_empty());
                self.make(base.map(|at| listed[at.index(listed.len())]), pages);
            }
            Act::Twins(pages, both) => self.twins(pages, *both),
            Act::Tag(at) | Act::Remove(at) | Act::Lease(at) => self.pick(act, *at),
            Act::Release => self.leases.clear(),
            Act::Collect(dead_percent_min) => {
                let dead_percent_min = *dead_percent_min;
                let options = GcOptions { dead_percent_min, frames_percent_max: 120 };
                self.store.gc(options).expect("a collection");
            }
            Act::Count => self.agrees(),
            Act::Reopen => {
                self.leases.clear();
                self.store = open(&self.disk, &self.settings);
            }
        }
    }

    fn pick(&mut self, act: &Act, at: prop::sample::Index) {
        let names = self.names();
        if names.is_empty() {
            return;
        }
        let name = &names[at.index(names.len())];
        match act {
            Act::Tag(_) => {
                let other = self.next_name().expect("a name");
                self.store.tag(name, other).expect("a tag");
            }
            Act::Lease(_) => {
                let image = self.store.lookup(name).expect("it is there").record.images[0].1;
                self.leases.push(self.store.lease(&[image]).expect("a lease"));
            }
            _ => drop(self.store.remove(name).expect("it is removed")),
        }
    }

    /// The ledger says what the mark says, bit by bit, and its rows say what
    /// the bits say.
    fn agrees(&self) {
        let depot = self.store.depot();
        let roots = roots(&self.store);
        let mut ledger = Ledger::current(depot, &roots).expect("a ledger");
        let marked = mark(depot, &roots).expect("a mark");
        assert_eq!(ledger.differs_from(&marked).expect("a comparison"), None);
        for (pack, row) in ledger.packs().clone() {
            assert_eq!(ledger.measure(pack).expect("a measure"), row, "{pack}");
        }
        drop(ledger);
        if self.leases.is_empty() {
            let counted = self.store.accounts().expect("accounts").store().expect("totals");
            assert_eq!(self.store.totals().expect("totals").0, counted);
        }
    }
}

fn roots(store: &Store) -> Roots {
    let entries = store.snapshots();
    let (_, leased, ()) = store.depot().pins().condemn(&BTreeSet::new(), || ());
    Roots::of(&entries, leased)
}

fn write(
    session: &mut crate::ingest::Session,
    base: Option<ImageRef>,
    pages: &[(u16, u8)],
) -> ImageRef {
    let pages: std::collections::BTreeMap<u16, u8> = pages.iter().copied().collect();
    let mut writer = session.image(401 * PAGE_LEN as u64, base.as_ref()).expect("an image");
    for (page, content) in pages {
        writer.write(u64::from(page), &[content; PAGE_LEN]).expect("a write");
    }
    writer.finish().expect("an image")
}

fn commit(session: crate::ingest::Session, image: ImageRef, name: Option<crate::id::Name>) {
    commit_both(session, image, None, name);
}

fn commit_both(
    session: crate::ingest::Session,
    image: ImageRef,
    stream: Option<ImageRef>,
    name: Option<crate::id::Name>,
) {
    let mut images = vec![(Role::Memory, image)];
    images.extend(stream.map(|stream| (Role::Stream, stream)));
    let record = SnapshotRecord { images, config: Vec::new(), parent: None };
    let options = CommitOptions { name, ..CommitOptions::default() };
    session.commit(&record, options).expect("a commit");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_ledger_agrees_with_the_mark(acts in prop::collection::vec(act(), 1..40)) {
        let mut world = World::new();
        for act in &acts {
            world.act(act);
        }
        world.agrees();
        world.store.gc(GcOptions { dead_percent_min: 0, frames_percent_max: 100 }).expect("done");
        world.agrees();
        let report = world.store.check(&mut |_| {}).expect("a check");
        prop_assert!(report.is_clean());
    }
}

/// Two sessions that store the same nodes at once, one in full and the other
/// as patches: in which form a node is found decides what else it needs.
#[test]
fn a_node_that_is_found_in_another_form_needs_another_base() {
    for patch_last in [false, true] {
        let mut world = lineage(0);
        let base = world.images[0];
        let mut full = world.store.begin().expect("a session");
        let mut patch = world.store.begin().expect("a session");
        let all: Vec<(u16, u8)> =
            (0..400).map(|page| (page, if page == 7 { 99 } else { (page % 250) as u8 })).collect();
        let image = write(&mut full, None, &all);
        assert_eq!(image, write(&mut patch, Some(base), &[(7, 99)]));
        let (first, last) = if patch_last { (full, patch) } else { (patch, full) };
        let (one, other) = (world.next_name(), world.next_name());
        commit(first, image, one);
        world.agrees();
        commit(last, image, other);
        world.store.remove("s1").expect("it is removed");
        world.agrees();
        let all = GcOptions { dead_percent_min: 0, frames_percent_max: 100 };
        world.store.gc(all).expect("a collection");
        world.agrees();
        let mut bytes = vec![0; PAGE_LEN];
        let mut reader = world.store.reader(&image).expect("a reader");
        reader.read_at(7 * PAGE_LEN as u64, &mut bytes).expect("a page");
        assert!(bytes.iter().all(|byte| *byte == 99));
        assert!(world.store.check(&mut |_| {}).expect("a check").is_clean());
    }
}

/// A wide image, so that deleting one of its descendants is little.
fn lineage(depth: u8) -> World {
    let mut world = World::new();
    let all: Vec<(u16, u8)> = (0..400).map(|page| (page, (page % 250) as u8)).collect();
    world.make(None, &all);
    for number in 0..depth {
        let base = world.images.last().copied();
        world.make(base, &[(u16::from(number), 251), (399, number)]);
    }
    world
}

#[test]
fn what_did_not_change_is_not_read_again() {
    let world = lineage(40);
    let depot = world.store.depot();
    let first = Ledger::current(depot, &roots(&world.store)).expect("a ledger").effort();
    assert!(first.anew && first.nodes_read > 80, "{first:?}");
    let again = Ledger::current(depot, &roots(&world.store)).expect("a ledger").effort();
    assert_eq!((again.anew, again.nodes_read), (false, 0));
    world.store.remove("s20").expect("it is removed");
    let after = Ledger::current(depot, &roots(&world.store)).expect("a ledger").effort();
    // Its top and the leaves that only it has.
    assert!(!after.anew && (1..=4).contains(&after.nodes_read), "{after:?}");
    world.agrees();
}

#[test]
fn a_ledger_that_does_not_add_up_is_taken_anew() {
    let world = lineage(3);
    let depot = world.store.depot();
    Ledger::current(depot, &roots(&world.store)).expect("a ledger");
    let top: NodeId = depot.root(&world.images[1]).expect("a root").top.expect("a top");
    // A count that cannot be: the node has fewer references.
    let rows = [(of_object(COUNT, top.key()), Some(vec![0; 8]))];
    depot.index().put_rows(depot.index().generation(), &rows).expect("a row");
    world.store.remove("s2").expect("it is removed");
    let ledger = Ledger::current(depot, &roots(&world.store)).expect("a ledger");
    assert!(ledger.effort().anew);
    drop(ledger);
    world.agrees();
    // A crash in the midst of a large change leaves no valid ledger.
    depot.index().put_rows(depot.index().generation(), &[(vec![VALID], None)]).expect("a row");
    let ledger = Ledger::current(depot, &roots(&world.store)).expect("a ledger");
    assert!(ledger.effort().anew);
}
