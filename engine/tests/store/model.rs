//! A store against a plain vector, under random histories.

use std::sync::Arc;

use coppice_engine::{Extent, ImageRef, IndexKind, PAGE_LEN, SimDisk, Store, tree_root_of};
use proptest::prelude::*;

use crate::common::{named, read_all, record_of, settings};

/// A snapshot to make: on which base, how much longer, and what changes.
#[derive(Debug, Clone)]
struct Step {
    base: Option<prop::sample::Index>,
    grow_by: usize,
    /// First page, pages and content; in ascending order once sorted.
    runs: Vec<(prop::sample::Index, usize, u8)>,
    reopen: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let runs = prop::collection::vec((any::<prop::sample::Index>(), 1..40_usize, 0..6_u8), 0..8);
    let grow = prop_oneof![0..3_usize, 4000..600_000_usize];
    (any::<Option<prop::sample::Index>>(), grow, runs, any::<bool>())
        .prop_map(|(base, grow_by, runs, reopen)| Step { base, grow_by, runs, reopen })
}

/// Content that often repeats; zero is zeros.
fn fill(bytes: &mut [u8], content: u8, first_page: usize) {
    for (page, number) in bytes.chunks_mut(PAGE_LEN).zip(first_page..) {
        page.fill(content);
        if content > 3 {
            page[0] = u8::try_from(number % 251).expect("below 251");
        }
    }
}

/// Changes the model and returns the runs that were changed.
fn change(bytes: &mut [u8], step: &Step) -> Vec<std::ops::Range<usize>> {
    let pages = bytes.len().div_ceil(PAGE_LEN);
    if pages == 0 {
        return Vec::new();
    }
    let mut starts: Vec<_> =
        step.runs.iter().map(|(at, len, content)| (at.index(pages), *len, *content)).collect();
    starts.sort_unstable();
    let mut done = Vec::new();
    let mut next = 0;
    for (start, len, content) in starts {
        let start = start.max(next);
        let end = (start + len).min(pages);
        if start >= end {
            continue;
        }
        let stop = (end * PAGE_LEN).min(bytes.len());
        fill(&mut bytes[start * PAGE_LEN..stop], content, start);
        done.push(start..end);
        next = end;
    }
    done
}

fn apply(store: &Store, step: &Step, number: usize, made: &mut Vec<(ImageRef, Vec<u8>)>) {
    let base = step.base.filter(|_| !made.is_empty()).map(|at| made[at.index(made.len())].clone());
    let mut bytes = base.as_ref().map_or(Vec::new(), |(_, bytes)| bytes.clone());
    bytes.resize(bytes.len() + step.grow_by, 0);
    let runs = change(&mut bytes, step);
    let mut session = store.begin().expect("a session");
    let base = base.map(|(image, _)| image);
    let mut writer = session.image(bytes.len() as u64, base.as_ref()).expect("an image");
    for run in runs {
        let stop = (run.end * PAGE_LEN).min(bytes.len());
        writer.write(run.start as u64, &bytes[run.start * PAGE_LEN..stop]).expect("a write");
    }
    let image = writer.finish().expect("an image");
    session.commit(&record_of(image), named(&format!("s{number}"))).expect("a commit");
    made.push((image, bytes));
}

fn verify(store: &Store, made: &[(ImageRef, Vec<u8>)]) {
    for (image, bytes) in made {
        assert_eq!(*image, tree_root_of(&bytes[..]).expect("a root"), "canonical");
        assert!(read_all(store, image) == *bytes);
        let map = store.page_map(image).expect("a map");
        for (page, number) in bytes.chunks(PAGE_LEN).zip(0..) {
            let is_zero = page.iter().all(|byte| *byte == 0);
            assert_eq!(map.extent(number) == Extent::Zero, is_zero);
        }
    }
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_reads_back(steps in prop::collection::vec(step(), 1..7)) {
        let disk = SimDisk::new();
        let mut settings = settings(IndexKind::Memory);
        settings.pack_objects_max = 100;
        let open = || Store::open_on(Arc::new(disk.clone()), &settings).expect("it opens");
        let mut store = open();
        let mut made = Vec::new();
        for (number, step) in steps.iter().enumerate() {
            apply(&store, step, number, &mut made);
            if step.reopen {
                store = open();
            }
        }
        verify(&store, &made);
    }

    #[test]
    fn appending_in_any_pieces_gives_the_same_image(
        pieces in prop::collection::vec(0..20_000_usize, 0..12),
        content in any::<u8>(),
    ) {
        let store = Store::open_on(Arc::new(SimDisk::new()), &settings(IndexKind::Memory))
            .expect("it opens");
        let mut session = store.begin().expect("a session");
        let mut writer = session.growing_image();
        let mut all = Vec::new();
        for len in pieces {
            let mut piece = vec![0; len];
            fill(&mut piece, content % 6, all.len() / PAGE_LEN);
            writer.append(&piece).expect("an append");
            all.extend_from_slice(&piece);
        }
        let image = writer.finish().expect("an image");
        prop_assert_eq!(image, tree_root_of(&all[..]).expect("a root"));
        session.commit(&record_of(image), named("it")).expect("a commit");
        prop_assert!(read_all(&store, &image) == all);
    }
}
