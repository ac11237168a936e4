//! Forks see the image, whole, once, and only their own writes.

use super::super::Script;
use super::fork::{Fork, Host, can_fault, shuffled};

const PAGES: u64 = 2048;

fn image() -> Script {
    Script { zero_every: 7, ..Script::plain(PAGES * 4096) }
}

/// Runs `act` for each fork on a thread of its own.
fn together(forks: &[Fork], act: impl Fn(u64, &Fork) + Sync) {
    std::thread::scope(|scope| {
        for (number, fork) in (0..).zip(forks) {
            let act = &act;
            scope.spawn(move || act(number, fork));
        }
    });
}

#[test]
fn many_forks_read_the_same_image_at_random_and_share_it() {
    if !can_fault() {
        return;
    }
    let (script, host) = (image(), Host::new(image()));
    let memory = host.open_pool(1);
    let forks: Vec<Fork> = (0..8).map(|n| host.fork(n, 1, &memory)).collect();
    together(&forks, |number, fork| {
        for page in shuffled(PAGES, number) {
            assert_eq!(fork.read(page), script.page(page), "page {page} of fork {number}");
        }
    });
    let stats = host.pool_with(|stats| stats.resident_pages == PAGES);
    assert_eq!(stats.zero_pages, PAGES.div_ceil(7));
    assert_eq!(stats.stored_pages, PAGES - PAGES.div_ceil(7));
    for fork in &forks {
        assert_eq!(fork.counts(), (PAGES, 0));
        assert!(fork.dirty().is_empty());
    }
}

#[test]
fn each_frame_is_read_once_however_many_ask() {
    if !can_fault() {
        return;
    }
    let script = Script { delay: std::time::Duration::from_millis(1), ..Script::plain(256 * 4096) };
    let host = Host::new(script);
    let memory = host.open_pool(1);
    let forks: Vec<Fork> = (0..12).map(|n| host.fork(n, 1, &memory)).collect();
    together(&forks, |number, fork| {
        for page in shuffled(fork.pages(), number) {
            fork.read(page);
        }
    });
    let stats = host.pool_with(|stats| stats.frames_read == 256 / 16);
    assert_eq!(stats.bytes_read, 256 * 4096);
    let installed: u64 = host.stats().1.iter().map(|(_, faults)| faults.pages_installed).sum();
    assert_eq!(installed, 256);
}

#[test]
fn writes_stay_with_their_fork_while_others_read() {
    if !can_fault() {
        return;
    }
    let (script, host) = (image(), Host::new(image()));
    let memory = host.open_pool(1);
    let forks: Vec<Fork> = (0..8).map(|n| host.fork(n, 1, &memory)).collect();
    let mark = |number: u64| [u8::try_from(number + 1).unwrap(); 4096];
    together(&forks, |number, fork| {
        for page in shuffled(PAGES, number + 100) {
            // Odd forks write every third page, half of them before reading.
            let writes = number % 2 == 1 && page % 3 == 0;
            if writes && page % 2 == 0 {
                fork.write(page, &mark(number));
            }
            let seen = fork.read(page);
            let old = script.page(page);
            let expected = if writes && page % 2 == 0 { mark(number) } else { old };
            assert_eq!(seen, expected, "page {page} of fork {number}");
            if writes {
                fork.write(page, &mark(number));
            }
        }
    });
    for (number, fork) in (0..).zip(&forks) {
        let written: Vec<u64> =
            (0..PAGES).filter(|page| number % 2 == 1 && page % 3 == 0).collect();
        assert_eq!(fork.dirty(), written);
        assert_eq!(fork.counts(), (PAGES - written.len() as u64, written.len() as u64));
        for page in 0..PAGES {
            let own = number % 2 == 1 && page % 3 == 0;
            let expected = if own { mark(number) } else { script.page(page) };
            assert_eq!(fork.read(page), expected, "page {page} of fork {number}");
        }
    }
    host.pool_with(|stats| stats.resident_pages == PAGES);
}

#[test]
fn a_reader_never_sees_half_a_page() {
    if !can_fault() {
        return;
    }
    // All forks run through the same pages in the same order, so they read
    // each page in the moment in which it appears.
    let script = Script { frame_pages: 1, ..Script::plain(PAGES * 4096) };
    let host = Host::new(script.clone());
    let memory = host.open_pool(1);
    let forks: Vec<Fork> = (0..6).map(|n| host.fork(n, 1, &memory)).collect();
    together(&forks, |_, fork| {
        for page in 0..PAGES {
            assert_eq!(fork.read(page), script.page(page), "page {page}");
        }
    });
    host.pool_with(|stats| stats.frames_read == PAGES);
}

#[test]
fn untouched_pages_cost_nothing() {
    if !can_fault() {
        return;
    }
    let host = Host::new(Script::plain(1 << 30));
    let memory = host.open_pool(1);
    let fork = host.fork(1, 1, &memory);
    fork.read(100_000);
    host.pool_with(|stats| stats.resident_pages == 16);
    // The kernel may map neighbours that are resident along with the page.
    let (shared, private) = fork.counts();
    assert!((1..=16).contains(&shared) && private == 0, "{shared} shared, {private} private");
}
