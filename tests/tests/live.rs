//! A Linux machine that is captured and forked while it goes on.
//!
//! A process in the guest counts into the pages of a file in memory, one after
//! the other, at the start and at the end of each. At any instant the pages
//! hold consecutive numbers. Before it writes a page, the process looks whether
//! that still holds the number of a round ago: a machine that continues from an
//! instant finds a page that was copied late, or torn, within one round, and
//! the number of that round it has in another page. It says so and ends.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::time::{Duration, Instant};

use coppice_tests::{Coppice, guest, naive_tree};
use serde_json::Value;

const PAGES: u64 = 64;

/// The process. It says that it counts once every page has its number.
const TICKER: &str = r"
import mmap, os, struct, time
fd = os.open('/dev/shm/ticks', os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 64 * 4096)
pages = mmap.mmap(fd, 64 * 4096)
n = 0
while True:
    n += 1
    at = n % 64 * 4096
    seen = (pages[at:at + 8], pages[at + 4088:at + 4096])
    word = struct.pack('<Q', max(0, n - 64))
    if seen != (word, word):
        open('/dev/shm/wrong', 'w').write('%d: %r' % (n, seen))
        break
    word = struct.pack('<Q', n)
    pages[at:at + 8] = word
    pages[at + 4088:at + 4096] = word
    if n == 64:
        open('/dev/shm/counts', 'w').close()
    if n % 16 == 0:
        time.sleep(0.02)
";

#[test]
fn a_machine_goes_on_while_it_is_captured_and_forked() {
    let Some(guest) = guest() else { return };
    let coppice = Coppice::new().unwrap();
    coppice.boot(&guest, "trunk", 128).unwrap();
    counts(&coppice);
    grows_while_it_counts(&coppice);
    disks_and_memory_are_of_one_instant(&coppice);
    a_paused_machine_is_the_same_both_ways(&coppice);
    layers_are_given_back(&coppice);
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
}

fn sh(coppice: &Coppice, machine: &str, script: &str) -> String {
    coppice.text(&["exec", machine, "--", "sh", "-c", script]).unwrap()
}

fn counts(coppice: &Coppice) {
    let ticker = coppice.scratch("ticker.py");
    std::fs::write(&ticker, TICKER).unwrap();
    coppice.text(&["cp", ticker.to_str().unwrap(), "trunk:/root/ticker.py"]).unwrap();
    let start = "python3 /root/ticker.py </dev/null >/root/ticker.log 2>&1 & echo $! > /root/pid";
    sh(coppice, "trunk", start);
    let begun = Instant::now();
    while !coppice
        .run(&["exec", "trunk", "--", "test", "-e", "/dev/shm/counts"])
        .unwrap()
        .status
        .success()
    {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "{}",
            sh(coppice, "trunk", "cat /root/ticker.log")
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Lets the process of a machine go round once more at least, stops it, and
/// returns what it had counted to. It may be stopped between the start and the
/// end of a page.
fn counted(coppice: &Coppice, machine: &str) -> u64 {
    let stop = "sleep 1; kill -STOP $(cat /root/pid); test ! -e /dev/shm/wrong || { cat /dev/shm/wrong >&2; exit 1; }; cat /dev/shm/ticks";
    let output = coppice.run(&["exec", machine, "--", "sh", "-c", stop]).unwrap();
    assert!(output.status.success(), "{machine}: {}", String::from_utf8_lossy(&output.stderr));
    let (pages, rest) = output.stdout.as_chunks::<4096>();
    assert_eq!((pages.len(), rest.len()), (64, 0), "{machine}");
    let word =
        |page: &[u8; 4096], at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    let numbers: Vec<(u64, u64)> =
        pages.iter().map(|page| (word(page, 0), word(page, 4088))).collect();
    let last = numbers.iter().map(|(start, _)| *start).max().unwrap();
    for (page, (start, end)) in (0..).zip(&numbers) {
        let back = (last + PAGES - page) % PAGES;
        assert_eq!(*start, last - back, "page {page} of {machine}, at {last}");
        let torn = *start == last && *end + PAGES == last;
        assert!(end == start || torn, "page {page} of {machine}: {start}, {end}");
    }
    last
}

/// The highest number that a machine has written; it goes on.
fn reached(coppice: &Coppice, machine: &str) -> u64 {
    let script = "import struct; print(max(struct.unpack('<Q', open('/dev/shm/ticks', 'rb').read()[p * 4096:p * 4096 + 8])[0] for p in range(64)))";
    let text = coppice.text(&["exec", machine, "--", "python3", "-c", script]).unwrap();
    text.trim().parse().unwrap()
}

fn grows_while_it_counts(coppice: &Coppice) {
    let before = reached(coppice, "trunk");
    let first = coppice.json(&["snapshot", "trunk", "--name", "first"]).unwrap();
    assert!(first["pause_us"].as_u64().unwrap() > 0, "{first}");
    let forked = coppice.json(&["fork", "trunk", "--name", "bough", "--count", "2"]).unwrap();
    assert!(forked["parent_pause_us"].as_u64().unwrap() > 0, "{forked}");
    // Nobody waits for what was begun before: a fork of a child, a fork of
    // that, a snapshot of a child.
    coppice.json(&["fork", "bough-1", "--name", "spray"]).unwrap();
    coppice.json(&["fork", "spray", "--name", "leaf"]).unwrap();
    coppice.json(&["snapshot", "bough-1", "--name", "bough"]).unwrap();
    // A machine that is still restoring.
    coppice.json(&["run", "bough", "--name", "bough-again"]).unwrap();
    coppice.json(&["snapshot", "bough-again", "--name", "restoring"]).unwrap();
    // Each has gone on for a while; one after the other, they are faster.
    let all = ["bough-1", "bough-2", "spray", "leaf", "bough-again"];
    for machine in all {
        coppice.text(&["pause", "--in-memory", machine]).unwrap();
    }
    let after = counted(coppice, "trunk");
    assert!(after > before, "the machine that was captured did not go on");
    for machine in all {
        coppice.text(&["resume", machine]).unwrap();
        let after = counted(coppice, machine);
        assert!(after > before, "{machine}: {after} after {before}");
        if machine != "bough-1" && machine != "spray" {
            coppice.text(&["rm", "--force", machine]).unwrap();
        }
    }
    for snapshot in ["first", "restoring"] {
        coppice.json(&["run", snapshot, "--name", "again"]).unwrap();
        let after = counted(coppice, "again");
        assert!(after > before, "{snapshot}: {after} after {before}");
        coppice.text(&["rm", "--force", "again"]).unwrap();
    }
}

/// A child sees the blocks that its parent had written, and not what either
/// of them writes later.
fn disks_and_memory_are_of_one_instant(coppice: &Coppice) {
    for round in 0..11 {
        let write =
            format!("echo {round} > /root/disk-{round}; sync; echo {round} > /dev/shm/round");
        sh(coppice, "trunk", &write);
        match round {
            5 => drop(coppice.json(&["fork", "trunk", "--name", "middle"]).unwrap()),
            _ => drop(
                coppice.json(&["snapshot", "trunk", "--name", &format!("round-{round}")]).unwrap(),
            ),
        }
    }
    let show = "echo 3 > /proc/sys/vm/drop_caches; cat /dev/shm/round; cat /root/disk-*| sort -n | tail -1; ls /root | grep -c disk-";
    assert_eq!(sh(coppice, "middle", show), "5\n5\n6\n");
    sh(coppice, "middle", "echo mine > /root/disk-3; sync");
    assert_eq!(sh(coppice, "trunk", show), "10\n10\n11\n");
    assert_eq!(sh(coppice, "trunk", "cat /root/disk-3"), "3\n");
    coppice.json(&["fork", "middle", "--name", "edge"]).unwrap();
    coppice.text(&["rm", "--force", "middle"]).unwrap();
    assert_eq!(
        sh(coppice, "edge", "echo 3 > /proc/sys/vm/drop_caches; cat /root/disk-3"),
        "mine\n"
    );
    coppice.json(&["snapshot", "edge", "--name", "edge"]).unwrap();
    coppice.text(&["rm", "--force", "edge"]).unwrap();
    coppice.json(&["run", "edge", "--name", "edge-again"]).unwrap();
    assert_eq!(sh(coppice, "edge-again", "cat /root/disk-3"), "mine\n");
    coppice.text(&["rm", "--force", "edge-again"]).unwrap();
}

fn memory_root(coppice: &Coppice, snapshot: &str) -> String {
    let shown = coppice.json(&["show", snapshot]).unwrap();
    let images = shown["images"].as_array().unwrap();
    let memory = images.iter().find(|image| image["part"] == "memory").unwrap();
    memory["root"].as_str().unwrap().to_owned()
}

/// A machine that stands still is captured, and forked live: the child's
/// memory is the captured memory, by a root computed without the engine.
fn a_paused_machine_is_the_same_both_ways(coppice: &Coppice) {
    coppice.text(&["pause", "--in-memory", "spray"]).unwrap();
    coppice.json(&["fork", "spray", "--name", "still", "--paused"]).unwrap();
    coppice.json(&["snapshot", "spray", "--name", "spray"]).unwrap();
    let dump = coppice.scratch("still.memory");
    coppice.text(&["dump-memory", "still", dump.to_str().unwrap()]).unwrap();
    let root = naive_tree::root_of(&std::fs::read(&dump).unwrap());
    assert_eq!(root, memory_root(coppice, "spray"));
    coppice.json(&["snapshot", "still", "--name", "still"]).unwrap();
    assert_eq!(memory_root(coppice, "still"), memory_root(coppice, "spray"));
}

/// What a machine holds twice is given back when nobody needs it.
fn layers_are_given_back(coppice: &Coppice) {
    for machine in ["bough-1", "spray", "still"] {
        coppice.text(&["rm", "--force", machine]).unwrap();
    }
    let begun = Instant::now();
    loop {
        let pools = coppice.json(&["pools"]).unwrap();
        let layer = |pool: &&Value| pool["root"].as_str().unwrap().starts_with("live-layer");
        if pools["pools"].as_array().unwrap().iter().find(layer).is_none() {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{pools}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
