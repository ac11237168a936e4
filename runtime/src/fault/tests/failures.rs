//! Pages that cannot be had, and machines that are gone.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use super::super::Script;
use super::fork::{Host, can_fault, shuffled};
use crate::protocol::{MachineKey, PagerEvent, PagerReply, PagerRequest, PoolId};
use crate::sys::userfault::Userfault;

const PAGES: u64 = 256;

fn losing(lost: &[u64], delay_ms: u64) -> Script {
    Script {
        lost: lost.iter().copied().collect::<HashSet<_>>(),
        delay: Duration::from_millis(delay_ms),
        ..Script::plain(PAGES * 4096)
    }
}

fn lost_page(event: PagerEvent) -> (MachineKey, u64) {
    let PagerEvent::PageLost { machine, pool, page, error } = event else { panic!("{event:?}") };
    assert_eq!(pool, PoolId(1));
    assert!(error.contains(&format!("page {page} is lost")), "{error}");
    (machine, page)
}

#[test]
fn a_lost_page_poisons_each_machine_that_needs_it_and_no_other_page() {
    if !can_fault() {
        return;
    }
    if !Userfault::can_poison() {
        eprintln!("skipped: no UFFDIO_POISON (Linux 6.6)");
        return;
    }
    let script = losing(&[35], 2);
    let host = Host::new(script.clone());
    let memory = host.open_pool(1);
    let forks: Vec<_> = (0..6).map(|n| host.fork(n, 1, &memory)).collect();
    std::thread::scope(|scope| {
        for (number, fork) in (0..).zip(&forks) {
            let script = &script;
            scope.spawn(move || {
                // Neighbours of the lost page must come, whoever asks first.
                for page in shuffled(PAGES, number) {
                    if page == 35 {
                        let error = fork.read_by_system_call(page).unwrap_err();
                        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
                    } else {
                        assert_eq!(fork.read(page), script.page(page));
                    }
                }
            });
        }
    });
    let told: BTreeSet<_> = (0..6).map(|_| lost_page(host.event())).collect();
    assert_eq!(told, (0..6).map(|n| (MachineKey(n), 35)).collect());
    host.pool_with(|stats| stats.resident_pages == PAGES - 1);
}

#[test]
fn a_frame_that_is_lost_whole_leaves_nobody_waiting() {
    if !can_fault() || !Userfault::can_poison() {
        return;
    }
    let lost: Vec<u64> = (16..32).collect();
    let host = Host::new(losing(&lost, 5));
    let memory = host.open_pool(1);
    let forks: Vec<_> = (0..4).map(|n| host.fork(n, 1, &memory)).collect();
    std::thread::scope(|scope| {
        for (number, fork) in (0..).zip(&forks) {
            let lost = &lost;
            scope.spawn(move || {
                for index in shuffled(16, number) {
                    let page = lost[usize::try_from(index).unwrap()];
                    fork.read_by_system_call(page).unwrap_err();
                }
            });
        }
    });
    let told: BTreeSet<_> = (0..64).map(|_| lost_page(host.event())).collect();
    assert_eq!(told.len(), 64);
    host.pool_with(|stats| stats.resident_pages == 0);
}

#[test]
fn slow_fetches_do_not_hold_up_pages_that_are_there() {
    if !can_fault() {
        return;
    }
    // More slow faults than workers; each page is a fetch of its own. What is
    // resident is answered in between, or this test never ends.
    let script =
        Script { frame_pages: 1, delay: Duration::from_millis(20), ..Script::plain(64 * 4096) };
    let host = Host::new(script.clone());
    let memory = host.open_pool(1);
    let forks: Vec<_> = (0..16).map(|n| host.fork(n, 1, &memory)).collect();
    std::thread::scope(|scope| {
        for (number, fork) in (0..).zip(&forks) {
            let script = &script;
            scope.spawn(move || {
                for page in shuffled(64, number) {
                    assert_eq!(fork.read(page), script.page(page));
                }
            });
        }
    });
    host.pool_with(|stats| stats.frames_read == 64);
}

#[test]
fn a_machine_that_goes_away_in_the_middle_of_a_fetch_harms_nobody() {
    if !can_fault() {
        return;
    }
    let script = losing(&[], 50);
    let host = Host::new(script.clone());
    let memory = host.open_pool(1);
    let leaving = host.fork(1, 1, &memory);
    let staying = host.fork(2, 1, &memory);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| leaving.read(3));
        // Detached whether or not its fault has been seen; the page comes
        // with the other machine's fault, and then the kernel is asked again.
        let (reply, _) = host.call(&PagerRequest::Detach { machine: MachineKey(1) }, &[]);
        assert!(matches!(reply, Ok(PagerReply::Machine(_))), "{reply:?}");
        assert_eq!(staying.read(3), script.page(3));
        leaving.userfault.wake(leaving.region().address, 4096 * 256).unwrap();
        assert_eq!(staying.read(4), script.page(4));
        // Woken once more, in case it began to wait only now.
        while !thread.is_finished() {
            leaving.userfault.wake(leaving.region().address, 4096 * 256).unwrap();
            std::thread::yield_now();
        }
        assert_eq!(thread.join().unwrap(), script.page(3));
    });
    let (reply, _) = host.call(&PagerRequest::Detach { machine: MachineKey(1) }, &[]);
    assert!(reply.unwrap_err().contains("there is no"));
}
