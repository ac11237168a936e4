//! What is remembered of nodes may be out of date.

use std::sync::Arc;

use crate::catalog::{Role, SnapshotRecord};
use crate::depot::StoredNode;
use crate::id::NodeId;
use crate::ingest::CommitOptions;
use crate::io::SimDisk;
use crate::settings::{IndexKind, Settings};
use crate::store::Store;
use crate::units::PAGE_LEN;

/// A leaf is remembered as a patch of a node that was collected since.
#[test]
fn a_base_that_is_gone_costs_a_patch_and_no_ingest() {
    let settings = Settings { index: IndexKind::Memory, ..Settings::default() };
    let store = Store::open_on(Arc::new(SimDisk::new()), &settings).expect("a store");
    let mut session = store.begin().expect("a session");
    let mut bytes: Vec<u8> = (0..100 * PAGE_LEN)
        .map(|at| u8::try_from(at / PAGE_LEN % 251).expect("below 251"))
        .collect();
    let image = session.blob(&bytes).expect("an image");
    let record = |image| SnapshotRecord {
        images: vec![(Role::Memory, image)],
        config: vec![],
        parent: None,
    };
    session.commit(&record(image), CommitOptions::default()).expect("a commit");
    let depot = store.depot();
    let leaf = depot.root(&image).expect("a root").top.expect("a leaf");
    let StoredNode { node, .. } = depot.stored_node(&leaf).expect("a leaf");
    depot.forget_cached();
    depot.remember(leaf, &node, Some(NodeId::of(b"gone")));

    let mut session = store.begin().expect("a session");
    let mut writer = session.image(100 * 4096, Some(&image)).expect("an image");
    bytes[7 * PAGE_LEN..8 * PAGE_LEN].fill(255);
    writer.write(7, &bytes[7 * PAGE_LEN..8 * PAGE_LEN]).expect("a write");
    let child = writer.finish().expect("an image");
    session.commit(&record(child), CommitOptions::default()).expect("a commit");
    let mut out = vec![0; bytes.len()];
    store.reader(&child).expect("a reader").read_at(0, &mut out).expect("a read");
    assert!(out == bytes);
}
