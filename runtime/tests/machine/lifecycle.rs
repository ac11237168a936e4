//! Boot, talk, pause, save, continue elsewhere, diverge, end. One boot serves
//! all of it: booting is what takes long.

use std::io::{Read, Write};
use std::time::Instant;

use coppice_runtime::protocol::{VmmEvent, VmmReply, VmmRequest};

use crate::guest::{CMDLINE, guest, pattern_sum};
use crate::harness::{Machine, Snapshot};
use crate::lazy;

fn boot_and_use() -> Option<Machine> {
    let guest = guest()?;
    let start = Instant::now();
    let mut machine = Machine::boot(&guest.kernel, &guest.root, 64, CMDLINE);
    println!("machine built: {:?}", start.elapsed());
    machine.resume();
    machine.wait_for_console("GUEST READY");
    println!("boot to init: {:?}", start.elapsed());

    assert_eq!(machine.tell("count"), "1");
    assert_eq!(machine.tell("count"), "2");
    assert_eq!(machine.tell("sum /pattern"), pattern_sum(), "what the disk gives");
    assert_eq!(machine.tell("put /file before"), "done");
    assert_eq!(machine.tell("get /file"), "before");
    assert_eq!(machine.tell("call"), "104", "a call to the host is reset (ECONNRESET)");
    echo(&mut machine, 300_000);
    refused(&mut machine);
    Some(machine)
}

/// Sends more than any buffer holds, while reading it back.
fn echo(machine: &mut Machine, len: usize) {
    let mut stream = machine.connect();
    stream.write_all(b"echo\n").unwrap();
    let data: Vec<u8> = (0..len).map(|at| (at / 7).to_le_bytes()[0]).collect();
    let mut writer = stream.try_clone().unwrap();
    let sent = data.clone();
    let start = Instant::now();
    let sender = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    println!("echo of {len} bytes: {:?}", start.elapsed());
    sender.join().unwrap();
    assert!(received == data, "{} of {len} bytes came back", received.len());
}

fn refused(machine: &mut Machine) {
    let mut stream = machine.connect_to(77);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "nobody listens on port 77");
}

fn capture(machine: &mut Machine) -> Snapshot {
    let start = Instant::now();
    machine.pause();
    let paused = start.elapsed();
    let snapshot = machine.save();
    println!(
        "paused: {paused:?}, state {} bytes, all: {:?}",
        snapshot.state.len(),
        start.elapsed()
    );
    snapshot
}

fn continue_from(snapshot: &Snapshot) -> Machine {
    let start = Instant::now();
    let mut machine = Machine::restore(snapshot);
    let built = start.elapsed();
    machine.resume();
    println!("process and build: {built:?}, running: {:?}", start.elapsed());
    machine
}

#[test]
fn a_machine_continues_elsewhere_and_diverges() {
    let Some(mut parent) = boot_and_use() else { return };
    // A connection that is open while the machine is captured.
    let mut open = parent.connect();
    open.write_all(b"echo\n1").unwrap();
    open.read_exact(&mut [0]).unwrap();
    let snapshot = capture(&mut parent);
    assert!(snapshot.overlays[0].iter().map(|run| run.count).sum::<u64>() > 0);

    parent.resume();
    open.write_all(b"2").unwrap();
    open.read_exact(&mut [0]).expect("the parent's connection survives its capture");
    drop(open);
    let start = Instant::now();
    let mut child = continue_from(&snapshot);
    assert_eq!(child.tell("count"), "3");
    println!("first answer of the child: {:?}", start.elapsed());
    assert_eq!(parent.tell("count"), "3");
    assert_eq!(child.tell("count"), "4");

    assert_eq!(child.tell("put /file child"), "done");
    assert_eq!(parent.tell("get /file"), "before");
    let mut sibling = continue_from(&snapshot);
    assert_eq!(sibling.tell("get /file"), "before");
    assert_eq!(child.tell("get /file"), "child");
    assert_ne!(child.tell("random"), sibling.tell("random"));
    assert_eq!(sibling.tell("sum /pattern"), pattern_sum());

    unchanged(&snapshot);
    lazy::arrives_page_by_page(&snapshot);
    lazy::pauses_without_the_page_server(&snapshot);
    lazy::ends_while_a_page_is_missing(&snapshot);
    grandchild(&mut child);
    lineage(snapshot);
    ends(&mut parent);
}

/// Every machine continues from the one before, captured right after its
/// answer: whatever is on its way at that moment must not be lost.
fn lineage(mut snapshot: Snapshot) {
    for count in 3..23 {
        let mut machine = Machine::restore(&snapshot);
        machine.resume();
        assert_eq!(machine.tell("count"), count.to_string());
        machine.pause();
        snapshot = machine.save();
    }
}

/// A machine that was restored and never ran is what was saved.
fn unchanged(snapshot: &Snapshot) {
    let again = Machine::restore(snapshot).save();
    assert!(again.state == snapshot.state, "the state differs");
    assert!(again.overlays[0].is_empty());
}

#[test]
fn two_vcpus_stop_and_continue() {
    let Some(guest) = guest() else { return };
    let mut machine = Machine::boot_with(&guest.kernel, &guest.root, 64, 2, CMDLINE);
    machine.resume();
    machine.wait_for_console("GUEST READY");
    assert_eq!(machine.tell("count"), "1");
    let snapshot = capture(&mut machine);
    drop(machine);
    assert_eq!(continue_from(&snapshot).tell("count"), "2");
}

/// A capture of a continued machine, whose pages are partly its pool's.
fn grandchild(child: &mut Machine) {
    let before: u64 = child.tell("clock").parse().unwrap();
    let snapshot = capture(child);
    let mut grandchild = continue_from(&snapshot);
    assert_eq!(grandchild.tell("count"), "5");
    assert_eq!(grandchild.tell("get /file"), "child");
    let after: u64 = grandchild.tell("clock").parse().unwrap();
    assert!(after >= before, "the guest's clock went back from {before} to {after}");
    echo(&mut grandchild, 300_000);
    assert!(grandchild.process.abandon().success(), "it ends with its supervisor");
}

fn ends(machine: &mut Machine) {
    let mut stream = machine.connect();
    stream.write_all(b"restart\n").unwrap();
    let VmmEvent::Exited { reason, clean } = machine.process.next_event();
    assert!(clean, "{reason}");
    // Its memory is there for whoever still copies from it.
    assert!(!machine.process.has_ended());
    let stopped = machine.process.ask(&VmmRequest::Stop, &[]).unwrap();
    assert_eq!(stopped.0, VmmReply::Stopping);
    assert!(machine.process.wait().success());
}
