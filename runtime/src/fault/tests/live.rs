//! Captures and forks of machines that go on writing.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::super::{Page, Script};
use super::fork::{Fork, Host, Mappable, can_fault};
use crate::pieces::{Piece, with_layer};
use crate::protocol::{PagerEvent, PagerRequest, PoolId};

const PAGES: u64 = 512;

/// A page that is nowhere zero and says which write it is.
fn stamp(number: u64) -> Page {
    let mut bytes = [0; 4096];
    bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&(number << 8).to_le_bytes()));
    bytes
}

fn mappable(id: u64, memory: OwnedFd) -> Mappable {
    Mappable { id, memory: Arc::new(memory) }
}

/// What a file has at a page, without a mapping.
fn stored(memory: &Mappable, page: u64) -> Page {
    let file = File::from(memory.memory.try_clone().unwrap());
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, page * 4096).unwrap();
    bytes
}

fn done(host: &Host, layer: u64) {
    let event = host.event();
    assert_eq!(event, PagerEvent::LayerDone { layer: PoolId(layer), error: None });
}

/// Small numbers that look random.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Writes page after page; between two writes others may look at what was
/// written. Writes are numbered from 1, and write `n` goes to page
/// `n * 7 % PAGES`.
fn write_on(fork: &Fork, written: &Mutex<u64>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut written = written.lock().unwrap();
        let number = *written + 1;
        fork.write(number * 7 % PAGES, &stamp(number));
        *written = number;
    }
}

/// The last of the first `written` writes that went to a page.
fn last_write(page: u64, written: u64) -> Option<u64> {
    (written.saturating_sub(PAGES) + 1..=written).rev().find(|n| *n != 0 && n * 7 % PAGES == page)
}

#[test]
fn a_capture_is_one_instant_however_many_overlap() {
    if !can_fault() {
        return;
    }
    let script = Script { zero_every: 5, ..Script::plain(PAGES * 4096) };
    let host = Host::new(script.clone());
    let memory = host.open_pool(1);
    let fork = host.fork(1, 1, &memory);
    let (written, stop) = (Mutex::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| write_on(&fork, &written, &stop));
        let mut captures = Vec::new();
        for layer in 100..140 {
            let file = mappable(layer, host.open_layer(layer, 1, &fork));
            // Some are taken early, when few pages were written.
            let instant = written.lock().unwrap();
            let pages = host.freeze(layer);
            captures.push((file, *instant, pages));
            drop(instant);
            std::thread::sleep(std::time::Duration::from_micros(layer % 7 * 50));
        }
        captures.iter().for_each(|_| drop(host.event()));
        stop.store(true, Ordering::Relaxed);
        for (file, instant, pages) in captures {
            let runs = host.runs(file.id);
            assert_eq!(runs.iter().map(|run| run.count).sum::<u64>(), pages);
            let mut found = 0;
            for page in runs.iter().flat_map(|run| run.first..run.first + run.count) {
                let number = last_write(page, instant).expect("a page that was written");
                assert!(stored(&file, page) == stamp(number), "page {page} at write {instant}");
                found += 1;
            }
            let expected = (0..PAGES).filter(|page| last_write(*page, instant).is_some()).count();
            assert_eq!(found, expected, "pages at write {instant}");
            let close = PagerRequest::ClosePool { pool: PoolId(file.id) };
            host.call(&close, &[]).0.unwrap();
        }
    });
    // The machine kept all that it wrote.
    let written = *written.lock().unwrap();
    for page in 0..PAGES {
        let expected = last_write(page, written).map_or_else(|| script.page(page), stamp);
        assert!(fork.read(page) == expected, "page {page}");
    }
}

#[test]
fn a_child_reads_pages_before_they_are_copied() {
    if !can_fault() {
        return;
    }
    let script = Script { zero_every: 5, ..Script::plain(PAGES * 4096) };
    let host = Host::new(script.clone());
    let base = mappable(1, host.open_pool(1));
    let fork = host.fork(1, 1, &base.memory);
    let (written, stop) = (Mutex::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| write_on(&fork, &written, &stop));
        for round in 0..12 {
            let layer = mappable(100 + round, host.open_layer(100 + round, 1, &fork));
            let held = written.lock().unwrap();
            host.freeze(layer.id);
            let instant = *held;
            drop(held);
            let below = Piece::whole(PAGES, base.clone());
            let runs = host.runs(layer.id);
            let pieces = with_layer(&below, &runs, &layer, PAGES, 9);
            let child = host.fork_of_pieces(1000 + round, &pieces);
            for page in super::fork::shuffled(PAGES, round) {
                let expected = last_write(page, instant).map_or_else(|| script.page(page), stamp);
                assert!(child.read(page) == expected, "page {page} of child {round}");
            }
            done(&host, layer.id);
            assert!(child.dirty().is_empty());
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// A machine of the random history, and what it must show.
struct Model {
    key: u64,
    fork: Fork,
    pieces: Vec<Piece<Mappable>>,
    shows: Vec<Option<u64>>,
}

impl Model {
    fn check(&self, script: &Script, page: u64) {
        let expected =
            self.shows[usize::try_from(page).unwrap()].map_or_else(|| script.page(page), stamp);
        assert!(self.fork.read(page) == expected, "page {page} of machine {}", self.key);
    }
}

/// Forks of forks of machines that write, in any order, with so few mappings
/// that layers have gaps, and with captures that are not waited for.
#[test]
fn forks_of_forks_show_what_they_must() {
    if !can_fault() {
        return;
    }
    const SMALL: u64 = 96;
    let script = Script { zero_every: 5, ..Script::plain(SMALL * 4096) };
    let rounds = if std::env::var_os("COPPICE_LONG").is_some() { 200 } else { 8 };
    for seed in 1..=rounds {
        let host = Host::new(script.clone());
        let base = mappable(0, host.open_pool(0));
        let pieces = Piece::whole(SMALL, base);
        let fork = host.fork_of_pieces(0, &pieces);
        let shows = vec![None; usize::try_from(SMALL).unwrap()];
        let mut machines = vec![Model { key: 0, fork, pieces, shows }];
        let mut dice = Dice(seed);
        for step in 1..=400 {
            let at = usize::try_from(dice.below(machines.len() as u64)).unwrap();
            let page = dice.below(SMALL);
            match dice.below(12) {
                0 if machines.len() < 40 => {
                    let child = live_fork(&host, &machines[at], step);
                    machines.push(child);
                }
                1..=5 => {
                    machines[at].fork.write(page, &stamp(step));
                    machines[at].shows[usize::try_from(page).unwrap()] = Some(step);
                }
                _ => machines[at].check(&script, page),
            }
        }
        for machine in &machines {
            (0..SMALL).for_each(|page| machine.check(&script, page));
        }
    }
}

fn live_fork(host: &Host, parent: &Model, key: u64) -> Model {
    let layer = mappable(key, host.open_layer(key, parent.key, &parent.fork));
    host.freeze(key);
    let runs = host.runs(key);
    let pages = parent.shows.len() as u64;
    let pieces = with_layer(&parent.pieces, &runs, &layer, pages, 12);
    let fork = host.fork_of_pieces(key, &pieces);
    Model { key, fork, pieces, shows: parent.shows.clone() }
}

#[test]
fn too_many_pages_are_refused_and_nothing_is_changed() {
    if !can_fault() {
        return;
    }
    let host = Host::new(Script::plain(PAGES * 4096));
    let memory = host.open_pool(1);
    let fork = host.fork(1, 1, &memory);
    (0..10).for_each(|page| fork.write(page * 3, &stamp(page + 1)));
    let _layer = host.open_layer(2, 1, &fork);
    let freeze = PagerRequest::Freeze { layer: PoolId(2), pages_max: 9 };
    let refusal = host.call(&freeze, &[]).0.unwrap_err();
    assert!(refusal.contains("10 pages"), "{refusal}");
    fork.write(3, &stamp(77));
    assert_eq!(host.freeze(2), 10);
    done(&host, 2);
    let again = host.call(&freeze, &[]).0.unwrap_err();
    assert!(again.contains("frozen already"), "{again}");
}
