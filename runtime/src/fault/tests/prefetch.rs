//! Pages that are fetched before anybody waits for them.

use std::time::Duration;

use super::super::Script;
use super::fork::{Host, can_fault, shuffled};
use super::store::{PAGES, host_of, page, store_in};
use crate::protocol::{MachineKey, PagerEvent, PagerReply, PagerRequest, PoolId};
use crate::sys::userfault::Userfault;

impl Host {
    fn prefetch(&self, machine: u64, pages: impl IntoIterator<Item = u64>) {
        let pages = pages.into_iter().map(|page| (PoolId(1), page)).collect();
        let request = PagerRequest::Prefetch { machine: MachineKey(machine), pages };
        assert_eq!(self.call(&request, &[]).0, Ok(PagerReply::Done));
    }

    fn touched(&self, machine: u64) -> Vec<u64> {
        match self.call(&PagerRequest::Touched { machine: MachineKey(machine) }, &[]).0 {
            Ok(PagerReply::Touched(pages)) => pages.into_iter().map(|(_, page)| page).collect(),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_one_machine_touched_is_there_when_the_next_one_needs_it() {
    if !can_fault() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (store, map) = store_in(dir.path());
    let wanted = [300, 9, 5, 444, 18, 6, 301];
    let touched = {
        let host = host_of(&store, &map);
        let memory = host.open_pool_of(1, &map.to_bytes());
        let fork = host.fork(1, 1, &memory);
        wanted.iter().for_each(|number| assert_eq!(fork.read(*number), page(*number)));
        assert_eq!(host.fork(2, 1, &memory).read(300), page(300));
        assert!(host.touched(2).is_empty(), "others had touched it before");
        host.touched(1)
    };
    // Pages that came along with others were no touch that anybody noticed.
    assert_eq!(touched[..2], wanted[..2]);
    assert!(touched.iter().all(|number| wanted.contains(number)), "{touched:?}");

    let host = host_of(&store, &map);
    let memory = host.open_pool_of(1, &map.to_bytes());
    let fork = host.fork(1, 1, &memory);
    host.prefetch(1, touched.iter().copied().chain([PAGES + 7, u64::MAX]));
    let stats = host.pool_with(|stats| stats.frames_prefetched >= 3 && stats.zero_pages >= 2);
    assert_eq!(stats.frames_prefetched, stats.frames_read);
    // What was prefetched last may just be on its way to the table.
    host.prefetch(1, [0]);
    host.pool_with(|stats| stats.zero_pages >= 3);
    wanted.iter().for_each(|number| assert_eq!(fork.read(*number), page(*number)));
    assert_eq!(host.stats().1[0].1.faults, 0, "nobody had to wait");
    assert!(host.touched(1).is_empty());
}

#[test]
fn a_frame_is_fetched_once_however_it_is_asked_for() {
    if !can_fault() {
        return;
    }
    let script = Script { delay: Duration::from_micros(300), ..Script::plain(2048 * 4096) };
    let host = Host::new(script.clone());
    let memory = host.open_pool(1);
    let forks: Vec<_> = (0..3).map(|number| host.fork(number, 1, &memory)).collect();
    host.prefetch(0, shuffled(2048, 3));
    std::thread::scope(|scope| {
        for (seed, fork) in (0..).zip(&forks) {
            let script = &script;
            scope.spawn(move || {
                for index in shuffled(2048, seed) {
                    assert_eq!(fork.read(index), script.page(index), "page {index}");
                }
            });
        }
    });
    let stats = host.pool_with(|stats| stats.resident_pages == 2048);
    assert_eq!(stats.frames_read, 2048 / script.frame_pages, "{stats:?}");
}

#[test]
fn prefetching_ends_with_its_machine() {
    if !can_fault() {
        return;
    }
    let frames = 1000;
    let script = Script { delay: Duration::from_millis(2), ..Script::plain(frames * 16 * 4096) };
    let host = Host::new(script.clone());
    let memory = host.open_pool(1);
    let [first, second] = [1, 2].map(|number| host.fork(number, 1, &memory));
    host.prefetch(1, (0..frames).map(|frame| frame * 16));
    let detach = PagerRequest::Detach { machine: MachineKey(1) };
    assert!(matches!(host.call(&detach, &[]).0, Ok(PagerReply::Machine(_))));
    drop(first);
    // Comes after all that was to be prefetched.
    host.prefetch(2, [(frames - 1) * 16]);
    assert_eq!(second.read(0), script.page(0));
    while host.stats().0[0].1.frames_prefetched == 0 {
        std::thread::yield_now();
    }
    let stats = host.pool_with(|stats| stats.resident_pages >= 32);
    assert!(stats.frames_read < frames, "{stats:?}");
}

#[test]
fn what_cannot_be_prefetched_is_lost_only_to_those_who_need_it() {
    if !can_fault() || !Userfault::can_poison() {
        return;
    }
    let script = Script { lost: [40].into(), ..Script::plain(256 * 4096) };
    let host = Host::new(script.clone());
    let memory = host.open_pool(1);
    let fork = host.fork(1, 1, &memory);
    host.prefetch(1, [40, 100]);
    host.pool_with(|stats| stats.frames_prefetched == 1);
    assert!(host.events.try_recv().is_err(), "nobody lost anything");
    for index in [41, 100, 101] {
        assert_eq!(fork.read(index), script.page(index));
    }
    fork.read_by_system_call(40).unwrap_err();
    assert!(matches!(host.event(), PagerEvent::PageLost { page: 40, .. }));
}
