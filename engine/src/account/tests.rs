//! Accounts against sets of objects found by plain walks.

use std::collections::HashSet;
use std::sync::Arc;

use proptest::prelude::*;

use super::table::{children, chunk_keys};
use crate::catalog::{Entry, Role, SnapshotRecord};
use crate::depot::Locator;
use crate::id::{NodeId, ObjectKey};
use crate::ingest::CommitOptions;
use crate::io::SimDisk;
use crate::ledger::share::share_of;
use crate::settings::{IndexKind, Settings};
use crate::store::Store;
use crate::tree::stream::StreamSource;
use crate::tree::{ImageRef, Splitter};
use crate::units::PAGE_LEN;

type Step = (Option<prop::sample::Index>, usize, Vec<(u16, u8)>);

fn step() -> impl Strategy<Value = Step> {
    let changes = prop::collection::vec((0..300_u16, 0..20_u8), 0..40);
    (any::<Option<prop::sample::Index>>(), 1..300_usize, changes)
}

fn store_of(steps: &[Step]) -> (Store, Vec<(ImageRef, Vec<u8>)>) {
    let settings = Settings { index: IndexKind::Memory, ..Settings::default() };
    let store = Store::open_on(Arc::new(SimDisk::new()), &settings).expect("it opens");
    let mut made: Vec<(ImageRef, Vec<u8>)> = Vec::new();
    for (number, (base, grow, changes)) in steps.iter().enumerate() {
        let base = base.filter(|_| !made.is_empty()).map(|at| made[at.index(made.len())].clone());
        let mut pages = base.as_ref().map_or(Vec::new(), |(_, pages)| pages.clone());
        pages.resize((pages.len() + grow).max(301), 0);
        let changes: std::collections::BTreeMap<_, _> = changes.iter().copied().collect();
        let mut session = store.begin().expect("a session");
        let len = (pages.len() * PAGE_LEN) as u64;
        let base = base.map(|(image, _)| image);
        let mut writer = session.image(len, base.as_ref()).expect("an image");
        for (page, content) in changes {
            pages[usize::from(page)] = content;
            writer.write(u64::from(page), &[content; PAGE_LEN]).expect("a write");
        }
        let image = writer.finish().expect("an image");
        let mut writer = session.stream();
        writer.append(&stream_of(&pages)).expect("a stream");
        let stream = writer.finish().expect("an image");
        let record = SnapshotRecord {
            images: vec![(Role::Memory, image), (Role::Stream, stream)],
            config: vec![u8::try_from(number).expect("few steps")],
            parent: None,
        };
        let name = format!("s{number}").parse().ok();
        session.commit(&record, CommitOptions { name, ..CommitOptions::default() }).expect("done");
        made.push((image, pages));
    }
    (store, made)
}

/// A stream that has most in common with those of like pages.
fn stream_of(pages: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 3000 * pages.len()];
    for (part, content) in bytes.chunks_mut(3000).zip(pages) {
        blake3::Hasher::new().update(&[*content]).finalize_xof().fill(part);
    }
    bytes
}

/// Every object that the entries need, found without counting.
fn needed(store: &Store, entries: &[Entry]) -> HashSet<ObjectKey> {
    let mut all = HashSet::new();
    let accounts = store.accounts().expect("accounts");
    for entry in entries {
        all.insert(entry.id.key());
        all.extend(accounts.table.events[&entry.id].iter().copied());
        for (_, image) in &entry.record.images {
            all.insert(image.root.key());
            let root = accounts.depot.root(image).expect("a root");
            match root.splitter {
                Splitter::Fixed4K => {
                    root.top.iter().for_each(|top| reach(&accounts.depot, *top, &mut all));
                }
                Splitter::FastCdc16K => {
                    root.top.iter().for_each(|top| reach_stream(&accounts.depot, *top, &mut all));
                }
            }
        }
    }
    all
}

fn reach(depot: &crate::depot::Depot, id: NodeId, all: &mut HashSet<ObjectKey>) {
    let stored = depot.stored_node(&id).expect("a node");
    all.insert(id.key());
    let mut base = stored.patch_of;
    while let Some(id) = base {
        all.insert(id.key());
        base = depot.stored_node(&id).expect("a base").patch_of;
    }
    if stored.node.level == 0 {
        all.extend(chunk_keys(&stored.node));
    } else {
        children(&stored.node).for_each(|child| reach(depot, child, all));
    }
}

fn reach_stream(depot: &crate::depot::Depot, id: NodeId, all: &mut HashSet<ObjectKey>) {
    let node = depot.load_stream_node(&id).expect("a node");
    all.insert(id.key());
    all.extend(node.chunks().map(|chunk| chunk.key()));
    node.nodes().for_each(|child| reach_stream(depot, child, all));
}

/// Plaintext bytes of the chunks and stored bytes of all.
fn weigh(store: &Store, keys: &HashSet<ObjectKey>) -> (u64, u64) {
    let accounts = store.accounts().expect("accounts");
    let keys: Vec<ObjectKey> = keys.iter().copied().collect();
    let places = Locator::new(&accounts.depot).locate(&keys).expect("places");
    places.into_iter().flatten().fold((0, 0), |(plain, stored), at| {
        let share = u64::from(share_of(&accounts.depot, &at).expect("a share").bytes);
        let frame = accounts.depot.frame(at.pack, &at.span).expect("a frame");
        let chunk = frame.chunk(at.slot).map_or(0, <[u8]>::len);
        (plain + chunk as u64, stored + share)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bills_are_exact(steps in prop::collection::vec(step(), 1..6), picks in any::<u8>()) {
        let (store, _) = store_of(&steps);
        let entries = store.snapshots();
        let (gone, left): (Vec<_>, Vec<_>) = entries.iter().cloned().enumerate()
            .partition(|(number, _)| picks & (1 << number) != 0);
        let only = |list: Vec<(usize, Entry)>| list.into_iter().map(|(_, e)| e).collect::<Vec<_>>();
        let (gone, left) = (only(gone), only(left));
        let accounts = store.accounts().expect("accounts");
        let bill = accounts.bill(&gone.iter().map(|entry| entry.id).collect()).expect("a bill");
        let (all, kept) = (needed(&store, &entries), needed(&store, &left));
        let dead: HashSet<_> = all.difference(&kept).copied().collect();
        let (exclusive, stored) = weigh(&store, &dead);
        prop_assert_eq!(bill.exclusive_bytes, exclusive);
        prop_assert_eq!(bill.frees_after_repack, stored);
        prop_assert_eq!(bill.shared_bytes + bill.exclusive_bytes, bill.referenced_bytes);
        let total = accounts.store().expect("totals");
        prop_assert_eq!(total.referenced_bytes, weigh(&store, &all).0);
        prop_assert_eq!(total.dead_bytes, 0);
        let stats = store.stats();
        prop_assert_eq!(total.stored_bytes, stats.stored_bytes);
        let parts = total.page_bytes + total.metadata_bytes + total.table_bytes + total.root_log_bytes;
        prop_assert_eq!(parts, stats.stored_bytes);
        // What was said to go is dead once it is gone.
        for entry in &gone {
            let name = entry.names.first().expect("a name").to_string();
            store.remove(&name).expect("removed");
        }
        let after = store.accounts().expect("accounts").store().expect("totals");
        prop_assert_eq!(after.dead_bytes, bill.frees_after_repack);
        prop_assert_eq!(after.dead_pack_bytes, bill.frees_now);
    }

    #[test]
    fn diffs_are_exact(steps in prop::collection::vec(step(), 2..4)) {
        let (store, made) = store_of(&steps);
        let ((one, left), (other, right)) = (&made[0], &made[made.len() - 1]);
        let found = store.diff(one, other).expect("a diff");
        let page = |pages: &[u8], at| pages.get(at).copied().unwrap_or(0);
        let differs: Vec<u64> = (0..left.len().max(right.len()))
            .filter(|at| page(left, *at) != page(right, *at)).map(|at| at as u64).collect();
        prop_assert_eq!(found.runs.iter().cloned().flatten().collect::<Vec<_>>(), differs);
        prop_assert!(found.runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        prop_assert_eq!(store.diff(other, one).expect("a diff").runs, found.runs);
        prop_assert_eq!(store.diff(one, one).expect("a diff").nodes_walked, 0);
    }
}

#[test]
fn a_diff_costs_what_differs() {
    let settings = Settings { index: IndexKind::Memory, ..Settings::default() };
    let store = Store::open_on(Arc::new(SimDisk::new()), &settings).expect("it opens");
    let len = 1_u64 << 32;
    let image = |base: Option<&ImageRef>, pages: &[u64], content| {
        let mut session = store.begin().expect("a session");
        let mut writer = session.image(len, base).expect("an image");
        for page in pages {
            writer.write(*page, &[content; PAGE_LEN]).expect("a write");
        }
        let image = writer.finish().expect("an image");
        let images = vec![(Role::Disk(0), image)];
        let record = SnapshotRecord { images, config: vec![content], parent: None };
        session.commit(&record, CommitOptions::default()).expect("a commit");
        image
    };
    let spread: Vec<u64> = (0..2000).map(|n| n * 512).collect();
    let base = image(None, &spread, 1);
    let changed = image(Some(&base), &[700_000], 2);
    let found = store.diff(&base, &changed).expect("a diff");
    assert_eq!((found.runs.first(), found.pages()), (Some(&(700_000..700_001)), 1));
    assert!(found.nodes_walked <= 6, "{} nodes", found.nodes_walked);
    // An image may be lower than the other one.
    let mut session = store.begin().expect("a session");
    let mut writer = session.image(4096, None).expect("an image");
    writer.write(0, &[1; PAGE_LEN]).expect("a write");
    let small = writer.finish().expect("an image");
    let images = vec![(Role::Disk(0), small)];
    let record = SnapshotRecord { images, config: Vec::new(), parent: None };
    session.commit(&record, CommitOptions::default()).expect("a commit");
    assert_eq!(store.diff(&small, &base).expect("a diff").pages(), 1999);
}
