//! Memory that a Linux guest frees is given back and not stored, in a machine
//! that booted, in its live forks and in what continues from the store.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::time::{Duration, Instant};

use coppice_tests::{Coppice, guest};

/// Fills 12 MiB with pages that are told from all others, and holds them until
/// it is told to end.
const HOLDER: &str = r"
import mmap, os, time
pages = mmap.mmap(-1, 12 << 20)
for at in range(0, 12 << 20, 4096):
    pages[at:at + 16] = b'coppice was here'
open('/dev/shm/full', 'w').close()
while not os.path.exists('/dev/shm/go'):
    time.sleep(0.1)
open('/dev/shm/gone', 'w').close()
";
const HELD: usize = (12 << 20) / 4096;
/// Left alone, Linux tells of free memory only in blocks of 4 MiB, and only while
/// more than 128 MiB are free: more than this machine has.
const SMALL_BLOCKS: &str = "echo 6 > /sys/module/page_reporting/parameters/page_reporting_order";
const MARK: &[u8] = b"coppice was here";
/// What may be left: the guest tells of free memory in blocks of 256 KiB, and
/// not of one in which a single page is used.
const LEFT: usize = HELD / 2;

#[test]
fn memory_that_a_guest_frees_is_gone() {
    let Some(guest) = guest() else { return };
    let coppice = Coppice::new().unwrap();
    coppice.boot(&guest, "trunk", 128).unwrap();
    let holder = coppice.scratch("holder.py");
    std::fs::write(&holder, HOLDER).unwrap();
    coppice.text(&["cp", holder.to_str().unwrap(), "trunk:/root/holder.py"]).unwrap();
    sh(&coppice, "trunk", SMALL_BLOCKS);
    sh(&coppice, "trunk", "python3 /root/holder.py </dev/null >/dev/null 2>&1 &");
    wait_for(&coppice, "trunk", "/dev/shm/full");
    assert!(marked(&coppice, "trunk", "full") > HELD * 9 / 10);

    // A live fork frees what the layer under it still has.
    coppice.json(&["fork", "trunk", "--name", "bough"]).unwrap();
    frees(&coppice, "bough");
    coppice.json(&["fork", "bough", "--name", "leaf", "--paused"]).unwrap();
    let dump = coppice.scratch("leaf.memory");
    coppice.text(&["dump-memory", "leaf", dump.to_str().unwrap()]).unwrap();
    assert!(count(&std::fs::read(dump).unwrap()) < LEFT, "a child reads what its parent freed");
    coppice.text(&["rm", "--force", "leaf"]).unwrap();

    // What continues from the store frees what its pool has.
    coppice.json(&["run", "full", "--name", "twig"]).unwrap();
    frees(&coppice, "twig");
    // What was freed is used again, and is zero for whoever gets it.
    let again = "import mmap; m = mmap.mmap(-1, 3 << 20); assert not any(m[:]); m[:] = bytes([7]) * (3 << 20); print(sum(m[::4096]))";
    for machine in ["twig", "bough"] {
        let sum = coppice.text(&["exec", machine, "--", "python3", "-c", again]).unwrap();
        assert_eq!(sum.trim(), (7 * (3 << 20) / 4096).to_string());
        coppice.text(&["rm", "--force", machine]).unwrap();
    }

    // A machine that booted gives the host its memory back.
    let before = private(&coppice);
    frees(&coppice, "trunk");
    assert!(private(&coppice) + (4 << 20) < before, "{} of {before}", private(&coppice));
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
}

fn sh(coppice: &Coppice, machine: &str, script: &str) -> String {
    coppice.text(&["exec", machine, "--", "sh", "-c", script]).unwrap()
}

fn wait_for(coppice: &Coppice, machine: &str, file: &str) {
    let begun = Instant::now();
    while !coppice.run(&["exec", machine, "--", "test", "-e", file]).unwrap().status.success() {
        assert!(begun.elapsed() < Duration::from_secs(300), "{file} does not come in {machine}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// How many pages of the holder are in a memory.
fn count(memory: &[u8]) -> usize {
    memory.chunks(4096).filter(|page| page.starts_with(MARK)).count()
}

/// How many are in a snapshot of the machine.
fn marked(coppice: &Coppice, machine: &str, name: &str) -> usize {
    coppice.json(&["snapshot", machine, "--name", name]).unwrap();
    let file = coppice.scratch(name);
    coppice.text(&["export", name, "--memory", file.to_str().unwrap()]).unwrap();
    let found = count(&std::fs::read(&file).unwrap());
    std::fs::remove_file(file).unwrap();
    found
}

/// Lets the holder of a machine end, and waits until snapshots know it: the guest
/// takes its time to tell.
fn frees(coppice: &Coppice, machine: &str) {
    sh(coppice, machine, "touch /dev/shm/go");
    wait_for(coppice, machine, "/dev/shm/gone");
    let begun = Instant::now();
    for round in 0.. {
        let left = marked(coppice, machine, &format!("{machine}-{round}"));
        if left < LEFT {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "{machine} still stores {left} pages");
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn private(coppice: &Coppice) -> u64 {
    let all = coppice.json(&["ps"]).unwrap();
    let machines = all["machines"].as_array().unwrap();
    let trunk = machines.iter().find(|line| line["name"] == "trunk").unwrap();
    trunk["private_bytes"].as_u64().unwrap()
}
