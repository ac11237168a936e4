//! Pools within a budget: what is dropped comes back as it was.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use coppice_engine::{GcOptions, IndexKind, Store};

use super::super::{EngineLibrary, Library, Script, ScriptedLibrary, Settings};
use super::fork::{Fork, Host, Mappable, can_fault, shuffled};
use super::store::{PAGES, import, page, table};
use crate::pieces::Piece;
use crate::protocol::{PagerEvent, PagerReply, PagerRequest, PoolId};

impl Host {
    /// Pages may go as soon as they have come.
    fn impatient(library: Arc<dyn Library>) -> Self {
        let tick = Duration::from_millis(1);
        let settings = Settings { young: tick, keeper_tick: tick, ..Settings::default() };
        Self::with_settings(library, settings)
    }

    fn budget(&self, pages: u64) {
        let request = PagerRequest::Budget { bytes: pages * 4096 };
        assert_eq!(self.call(&request, &[]).0, Ok(PagerReply::Done));
    }
}

/// What a fork's page holds after it has written to it.
fn written(machine: u64, index: u64, round: u64) -> [u8; 4096] {
    let word = (machine << 48 | round << 32 | index).to_le_bytes();
    let mut bytes = [0; 4096];
    bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word));
    bytes
}

/// Reads everything again and again, and writes to some of it.
fn live(fork: &Fork, (machine, rounds): (u64, u64), original: &dyn Fn(u64) -> [u8; 4096]) {
    let mut mine = vec![None; usize::try_from(fork.pages()).unwrap()];
    for round in 0..rounds {
        for index in shuffled(fork.pages(), machine * 100 + round) {
            let own = &mut mine[usize::try_from(index).unwrap()];
            let expected = own.map_or_else(|| original(index), |r| written(machine, index, r));
            assert_eq!(fork.read(index), expected, "page {index} of {machine} in {round}");
            if (index + round + machine).is_multiple_of(11) {
                fork.write(index, &written(machine, index, round));
                *own = Some(round);
            }
        }
    }
}

#[test]
fn no_byte_is_wrong_while_pages_come_and_go() {
    if !can_fault() {
        return;
    }
    let pages = 2048;
    let script = Script { zero_every: 5, ..Script::plain(pages * 4096) };
    let host = Host::impatient(Arc::new(ScriptedLibrary(script.clone())));
    let memory = host.open_pool(1);
    let forks: Vec<_> = (0..3).map(|number| host.fork(number, 1, &memory)).collect();
    let rounds = if std::env::var_os("COPPICE_LONG").is_some() { 100 } else { 4 };
    std::thread::scope(|scope| {
        let living: Vec<_> = (0..)
            .zip(&forks)
            .map(|(number, fork)| {
                let script = &script;
                scope.spawn(move || live(fork, (number, rounds), &|index| script.page(index)))
            })
            .collect();
        // From nothing at all to more than there is.
        for budget in shuffled(pages + 100, 1).iter().cycle() {
            host.budget(if budget % 3 == 0 { 0 } else { *budget });
            host.stats();
            if living.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                break;
            }
        }
        let ended: Vec<_> = living.into_iter().map(|thread| thread.join()).collect();
        assert!(ended.iter().all(Result::is_ok), "a byte was wrong");
    });
    assert!(host.stats().0[0].1.evicted_pages > 0, "nothing was dropped");
}

#[test]
fn a_pool_beyond_its_budget_gets_smaller_and_unused_ones_go_first() {
    if !can_fault() {
        return;
    }
    let script = Script::plain(1024 * 4096);
    let host = Host::impatient(Arc::new(ScriptedLibrary(script.clone())));
    let used = host.open_pool(1);
    let fork = host.fork(1, 1, &used);
    let unused = host.open_pool(2);
    let other = host.fork(2, 2, &unused);
    for index in 0..1024 {
        assert_eq!(fork.read(index), script.page(index));
        assert_eq!(other.read(index), script.page(index));
    }
    let detach = PagerRequest::Detach { machine: crate::protocol::MachineKey(2) };
    assert!(matches!(host.call(&detach, &[]).0, Ok(PagerReply::Machine(_))));
    drop(other);
    let until = |small: &dyn Fn([u64; 2]) -> bool| {
        let begun = std::time::Instant::now();
        loop {
            let pools = host.stats().0;
            let held = [pools[0].1.resident_pages, pools[1].1.resident_pages];
            if small(held) {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{pools:?}");
            std::thread::yield_now();
        }
    };
    host.budget(1200);
    until(&|[used, unused]| used + unused <= 1200);
    assert_eq!(host.stats().0[0].1.resident_pages, 1024, "the unused one went first");
    host.budget(100);
    until(&|[used, unused]| used <= 100 && unused == 0);
    for index in shuffled(1024, 5) {
        assert_eq!(fork.read(index), script.page(index));
    }
}

#[test]
fn what_was_dropped_is_found_where_a_collection_moved_it() {
    if !can_fault() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let settings = coppice_engine::Settings {
        index: IndexKind::Memory,
        ..coppice_engine::Settings::default()
    };
    let store = Store::open(&dir.path().join("store"), &settings).unwrap();
    import(&store, dir.path(), "large", 0..2 * PAGES);
    let image = import(&store, dir.path(), "small", 0..PAGES);
    let host = Host::impatient(Arc::new(EngineLibrary::default()));
    let give = |map: &coppice_engine::PageMap| {
        for pack in map.packs() {
            let file = store.pack_file(*pack).unwrap();
            let request = PagerRequest::AddPack { pack: pack.0 };
            assert_eq!(host.call(&request, &[file.as_fd()]).0, Ok(PagerReply::Done));
        }
    };
    let before = store.page_map(&image).unwrap();
    give(&before);
    let memory = host.open_pool_of(1, &before.to_bytes());
    let fork = host.fork(1, 1, &memory);
    (0..PAGES).for_each(|index| assert_eq!(fork.read(index), page(index)));

    store.remove("large").unwrap();
    store.gc(GcOptions { dead_percent_min: 0, ..Default::default() }).unwrap();
    let after = store.page_map(&image).unwrap();
    assert!(before.packs().iter().all(|pack| !after.packs().contains(pack)));
    give(&after);
    let renew = PagerRequest::RenewPool { pool: PoolId(1) };
    assert_eq!(host.call(&renew, &[table(&after.to_bytes()).as_fd()]).0, Ok(PagerReply::Done));
    let gone = before.packs().iter().map(|pack| pack.0).collect();
    let forget = PagerRequest::ForgetPacks { packs: gone };
    assert_eq!(host.call(&forget, &[]).0, Ok(PagerReply::Done));
    host.budget(0);
    host.pool_with(|stats| stats.resident_pages == 0);
    (0..PAGES).for_each(|index| assert_eq!(fork.read(index), page(index), "page {index}"));
}

#[test]
fn a_layer_keeps_its_pages_and_finds_those_below() {
    if !can_fault() {
        return;
    }
    let script = Script { zero_every: 7, ..Script::plain(512 * 4096) };
    let host = Host::impatient(Arc::new(ScriptedLibrary(script.clone())));
    let memory = Arc::new(host.open_pool(1));
    let parent = host.fork(1, 1, &memory);
    let own = |index: u64| index.is_multiple_of(3);
    (0..512).for_each(|index| assert_eq!(parent.read(index), script.page(index)));
    (0..512).filter(|i| own(*i)).for_each(|i| parent.write(i, &written(1, i, 0)));
    host.budget(0);
    let layer = Arc::new(host.open_layer(2, 1, &parent));
    assert_eq!(host.freeze(2), 171);
    let child = host.fork_of_pieces(2, &Piece::whole(512, Mappable { id: 2, memory: layer }));
    for index in shuffled(512, 9) {
        let expected = if own(index) { written(1, index, 0) } else { script.page(index) };
        assert_eq!(child.read(index), expected, "page {index}");
    }
    assert!(matches!(host.event(), PagerEvent::LayerDone { error: None, .. }));
    let layer = host.stats().0[1].1;
    assert!(layer.evicted_pages == 0 && layer.resident_pages >= 171, "{layer:?}");
    drop(File::from(memory.try_clone().unwrap()));
}
