//! Machines whose memory and disk arrive page by page.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;

use crate::guest::pattern_sum;
use crate::harness::{Machine, Snapshot};
use crate::pager::Pager;

/// It works with nothing resident.
pub(crate) fn arrives_page_by_page(snapshot: &Snapshot) {
    let mut machine = Machine::restore_lazily(snapshot);
    let pager = Pager::serve(&machine, snapshot);
    let start = std::time::Instant::now();
    machine.resume();
    assert_eq!(machine.tell("count"), "3");
    println!(
        "first answer, lazily: {:?}, {} faults",
        start.elapsed(),
        pager.faults.load(Ordering::Relaxed)
    );
    assert_eq!(machine.tell("sum /pattern"), pattern_sum());
    assert_eq!(machine.tell("get /file"), "before");
    assert_eq!(machine.tell("count"), "4");
}

/// Pages that do not come neither hang a pause nor break what was captured.
pub(crate) fn pauses_without_the_page_server(snapshot: &Snapshot) {
    let mut machine = Machine::restore_lazily(snapshot);
    let pager = Pager::serve(&machine, snapshot);
    machine.resume();
    assert_eq!(machine.tell("count"), "3");
    let mut stream = machine.connect();
    let held = pager.hold.lock().unwrap();
    stream.write_all(b"sum /pattern\n").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let paused = machine.pause_within(500);
    println!("a pause without the page server: {paused:?}");
    if paused.is_ok() {
        machine.resume();
    }
    drop(held);
    let mut sum = String::new();
    stream.read_to_string(&mut sum).unwrap();
    assert_eq!(sum.trim(), pattern_sum(), "it went on as if nothing had happened");
    machine.pause();
}

/// Nobody will ever send the page; the supervisor goes away.
pub(crate) fn ends_while_a_page_is_missing(snapshot: &Snapshot) {
    let mut machine = Machine::restore_lazily(snapshot);
    machine.process.send(&coppice_runtime::protocol::VmmRequest::Resume);
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(machine.process.abandon().success());
}
