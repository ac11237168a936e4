//! The whole life of a store on a real disk against a plain map: everything
//! that a user can do, in any order, damage and its repair among it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use coppice_engine::{
    CheckScope, CommitOptions, ErrorKind, GcOptions, ImageRef, IndexKind, PAGE_LEN, Role, Settings,
    SnapshotRecord, Store,
};
use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};

use crate::common::{name, noise, open_as, settings};
use crate::tried;

/// Histories, and with `COPPICE_LONG`.
const CASES: u32 = 24;
const CASES_LONG: u32 = 300;
const PAGES: usize = 300;

#[derive(Debug, Clone)]
enum Step {
    /// A snapshot on the memory of another, or on none, with these pages set
    /// to these contents, and the stream of another with some bytes put in.
    Make {
        base: Option<prop::sample::Index>,
        pages: Vec<(u16, u8)>,
        insert: u16,
        named: bool,
    },
    Tag(prop::sample::Index),
    Remove(prop::sample::Index),
    Collect {
        dead_percent_min: u8,
        frames_percent_max: u32,
    },
    Reopen,
    /// From the packs alone.
    Rebuild,
    /// Beside the owner, for reading only.
    Look,
    Check(u8),
    /// A bit of a pack turns; then all that can be had is kept, and the same
    /// bytes heal the rest.
    Damage {
        pack: prop::sample::Index,
        at: prop::sample::Index,
        tables: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let pages = prop::collection::vec((0..300_u16, 0..12_u8), 1..40);
    let make = (any::<Option<prop::sample::Index>>(), pages, any::<u16>(), any::<bool>());
    let gc = (prop_oneof![Just(0_u8), Just(30), Just(100)], prop_oneof![Just(100_u32), Just(150)]);
    prop_oneof![
        6 => make.prop_map(|(base, pages, insert, named)| Step::Make { base, pages, insert, named }),
        1 => index().prop_map(Step::Tag),
        3 => index().prop_map(Step::Remove),
        2 => gc.prop_map(|(dead_percent_min, frames_percent_max)| Step::Collect { dead_percent_min, frames_percent_max }),
        1 => Just(Step::Reopen),
        1 => Just(Step::Rebuild),
        1 => Just(Step::Look),
        1 => prop_oneof![Just(0_u8), Just(50), Just(100)].prop_map(Step::Check),
        2 => (index(), index(), any::<bool>()).prop_map(|(pack, at, tables)| Step::Damage { pack, at, tables }),
    ]
}

/// A snapshot as the model has it.
#[derive(Debug, Clone)]
struct Made {
    names: BTreeSet<String>,
    memory: (ImageRef, Vec<u8>),
    stream: (ImageRef, Vec<u8>),
}

struct World<'w> {
    dir: &'w Path,
    settings: Settings,
    /// `None` only while it is being opened.
    store: Option<Store>,
    /// By id.
    made: BTreeMap<String, Made>,
    number: u64,
}

impl World<'_> {
    fn store(&self) -> &Store {
        self.store.as_ref().expect("it is open")
    }

    fn reopen(&mut self) {
        self.store = None;
        self.store = Some(open_as(self.dir, &self.settings).expect("it opens"));
    }

    fn rebuild(&mut self) {
        self.store = None;
        let opened =
            (0..1000).find_map(|_| Store::open_without_index(self.dir, &self.settings).ok());
        self.store = Some(opened.expect("it opens"));
    }

    fn pick(&self, at: &prop::sample::Index) -> Option<(String, Made)> {
        let ids: Vec<&String> = self.made.keys().collect();
        let id = ids.get(at.index(ids.len().max(1)))?;
        Some(((*id).clone(), self.made[*id].clone()))
    }

    fn make(&mut self, base: Option<Made>, pages: &[(u16, u8)], insert: u16, named: bool) {
        self.number += 1;
        let mut bytes = base.as_ref().map_or(vec![0; PAGES * PAGE_LEN], |it| it.memory.1.clone());
        let mut stream = base.as_ref().map_or(noise(9, 200_000), |it| it.stream.1.clone());
        let at = usize::from(insert) % stream.len();
        stream.splice(at..at, noise(u64::from(insert), usize::from(insert) % 700));
        let mut session = self.store().begin().expect("a session");
        let base = base.map(|base| base.memory.0);
        let mut writer = session.image(bytes.len() as u64, base.as_ref()).expect("an image");
        for (page, kind) in pages.iter().copied().collect::<BTreeMap<u16, u8>>() {
            let mut new = vec![kind; PAGE_LEN];
            if kind > 5 {
                new[..2].copy_from_slice(&page.to_le_bytes());
            }
            let at = usize::from(page) * PAGE_LEN;
            bytes[at..at + PAGE_LEN].copy_from_slice(&new);
            writer.write(u64::from(page), &new).expect("a write");
        }
        let memory = writer.finish().expect("an image");
        let mut writer = session.stream();
        writer.append(&stream).expect("a stream");
        let stream = (writer.finish().expect("a stream"), stream);
        let images = vec![(Role::Memory, memory), (Role::Stream, stream.0)];
        // No two snapshots are the same one.
        let config = self.number.to_le_bytes().to_vec();
        let as_name = named.then(|| format!("s{}", self.number));
        let options = CommitOptions { name: as_name.as_deref().map(name), ..Default::default() };
        let record = SnapshotRecord { images, config, parent: None };
        let id = session.commit(&record, options).expect("a commit").id;
        let names = as_name.into_iter().collect();
        self.made.insert(id.to_string(), Made { names, memory: (memory, bytes), stream });
    }

    fn tag(&mut self, id: &str) {
        self.number += 1;
        let new = format!("t{}", self.number);
        self.store().tag(id, name(&new)).expect("a tag");
        self.made.get_mut(id).expect("it is there").names.insert(new);
    }

    fn remove(&mut self, id: &str) {
        let made = self.made.get_mut(id).expect("it is there");
        let first = made.names.pop_first();
        let gone = made.names.is_empty();
        if first.is_some() && !gone {
            let refused = self.store().remove(id).expect_err("it has names");
            assert_eq!(refused.kind(), ErrorKind::Invalid);
        }
        self.store().remove(first.as_deref().unwrap_or(id)).expect("it is removed");
        if gone {
            self.made.remove(id);
        }
    }

    fn damage(&mut self, pack: &prop::sample::Index, at: &prop::sample::Index, tables: bool) {
        let mut packs: Vec<_> = std::fs::read_dir(self.dir.join("packs")).expect("packs").collect();
        if packs.is_empty() {
            return;
        }
        let path = packs.swap_remove(pack.index(packs.len())).expect("a pack").path();
        let file = std::fs::File::options().read(true).write(true).open(path).expect("a pack");
        let len = file.metadata().expect("a pack").len();
        let at = at.index(usize::try_from(len).expect("small")) as u64;
        let at = if tables { len - 1 - at % 300.min(len) } else { at };
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("a byte");
        file.write_all_at(&[byte[0] ^ 8], at).expect("a write");
        let (repaired, left) = self.store().repair(&mut |_| {}).expect("a repair");
        assert_eq!(repaired.quarantined.len(), 1, "a flip is found");
        let named: BTreeSet<&String> = left.damages.iter().flat_map(|it| &it.snapshots).collect();
        for (id, made) in &self.made {
            let is_named = named.contains(id) || made.names.iter().any(|it| named.contains(it));
            assert_eq!(self.loses(made), is_named, "what is lost is named, and nothing else");
        }
        // The same bytes heal it.
        let all: Vec<Made> = self.made.values().cloned().collect();
        for made in all {
            let mut session = self.store().begin().expect("a session");
            let memory = session.blob(&made.memory.1).expect("an image");
            let mut writer = session.stream();
            writer.append(&made.stream.1).expect("a stream");
            let images = vec![(Role::Memory, memory), (Role::Stream, writer.finish().expect("it"))];
            let record = SnapshotRecord { images, config: b"heal".to_vec(), parent: None };
            let id = session.commit(&record, CommitOptions::default()).expect("a commit").id;
            self.store().remove(&id.to_string()).expect("it is removed");
        }
    }

    /// Whether a part of a snapshot cannot be read. What can be is right.
    fn loses(&self, made: &Made) -> bool {
        let mut loses = false;
        for (image, bytes) in [&made.memory, &made.stream] {
            let mut reader = match self.store().reader(image) {
                Ok(reader) => reader,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                    loses = true;
                    continue;
                }
            };
            for (part, number) in bytes.chunks(PAGE_LEN).zip(0_u64..) {
                let mut out = vec![0xee; part.len()];
                match reader.read_at(number * PAGE_LEN as u64, &mut out) {
                    Ok(_) => assert!(out == part, "a wrong byte"),
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                        loses = true;
                    }
                }
            }
        }
        loses
    }

    fn act(&mut self, step: &Step) {
        match step {
            Step::Make { base, pages, insert, named } => {
                let base = base.as_ref().and_then(|at| self.pick(at)).map(|(_, made)| made);
                self.make(base, pages, *insert, *named);
            }
            Step::Tag(at) => {
                if let Some((id, _)) = self.pick(at) {
                    self.tag(&id);
                }
            }
            Step::Remove(at) => {
                if let Some((id, _)) = self.pick(at) {
                    self.remove(&id);
                }
            }
            Step::Collect { dead_percent_min, frames_percent_max } => {
                let (dead_percent_min, frames_percent_max) =
                    (*dead_percent_min, *frames_percent_max);
                let options = GcOptions { dead_percent_min, frames_percent_max };
                self.store().gc_plan(options).expect("a plan");
                let done = self.store().gc(options).expect("a collection");
                assert_eq!(done.incomplete, None);
            }
            Step::Reopen => self.reopen(),
            Step::Rebuild => self.rebuild(),
            Step::Look => {
                let view = Store::open_read_only(self.dir, &self.settings).expect("a view");
                self.compare(&view);
                assert_eq!(
                    view.gc(GcOptions::default()).map_err(|e| e.kind()).err(),
                    Some(ErrorKind::Invalid)
                );
            }
            Step::Check(percent) => {
                let scope = CheckScope::Sample { percent: *percent, seed: self.number };
                let report = self.store().check_some(scope, &mut |_| {}).expect("a check");
                assert!(report.is_clean() && !report.recounted, "{report:?}");
            }
            Step::Damage { pack, at, tables } => {
                self.damage(pack, at, *tables);
                self.verify();
            }
        }
    }

    /// A store lists what the model has, and gives its bytes.
    fn compare(&self, store: &Store) {
        let listed: BTreeMap<String, BTreeSet<String>> = store
            .snapshots()
            .into_iter()
            .map(|it| (it.id.to_string(), it.names.iter().map(ToString::to_string).collect()))
            .collect();
        let made: BTreeMap<String, BTreeSet<String>> =
            self.made.iter().map(|(id, made)| (id.clone(), made.names.clone())).collect();
        assert_eq!(listed, made);
        for made in self.made.values() {
            for (image, bytes) in [&made.memory, &made.stream] {
                assert!(crate::common::read_all(store, image) == *bytes);
            }
        }
    }

    fn verify(&self) {
        self.compare(self.store());
        let report = self.store().check(&mut |_| {}).expect("a check");
        assert!(report.is_clean() && !report.recounted, "{report:?}");
    }
}

#[test]
fn any_life_of_a_store_is_that_of_a_map() {
    let long = std::env::var_os("COPPICE_LONG").is_some();
    let cases = if long { CASES_LONG } else { CASES };
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let (histories, steps) = (AtomicU64::new(0), AtomicU64::new(0));
    let life = (prop::collection::vec(step(), 1..22), any::<bool>());
    let outcome = TestRunner::new(config).run(&life, |(life, on_disk)| {
        let dir = tempfile::tempdir().expect("a folder");
        let index = if on_disk { Settings::default().index } else { IndexKind::Memory };
        let settings = Settings { pack_objects_max: 90, ..settings(index) };
        let mut world =
            World { dir: dir.path(), settings, store: None, made: BTreeMap::new(), number: 0 };
        world.reopen();
        for step in &life {
            world.act(step);
            steps.fetch_add(1, Ordering::Relaxed);
        }
        world.reopen();
        world.verify();
        histories.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    if let Err(TestError::Fail(why, life)) = outcome {
        panic!("{why}\n{life:?}");
    }
    let steps = steps.into_inner();
    tried(histories.into_inner(), &format!("histories of a store, of {steps} steps in all"));
}
