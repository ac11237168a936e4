//! Linux machines whose page server is killed while they work, are captured and
//! are forked.
//!
//! A process in the guest keeps pages with checksums: it looks at one, writes it
//! anew, and goes on. One that is not what was written last, in whichever
//! machine, ends it with a word of that.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coppice_tests::{Coppice, guest};

/// The process. It says that it works, and how far it is.
const KEEPER: &str = r"
import os, time, zlib
pages = [bytearray(os.urandom(64) * 64) for _ in range(128)]
sums = [zlib.crc32(page) for page in pages]
open('/dev/shm/works', 'w').close()
progress = os.open('/dev/shm/rounds', os.O_RDWR | os.O_CREAT)
n = 0
while True:
    n += 1
    at = n * 7919 % len(pages)
    if zlib.crc32(pages[at]) != sums[at]:
        open('/dev/shm/wrong', 'w').write('page %d in round %d' % (at, n))
        break
    pages[at][:] = (b'%016d' % n) * 256
    sums[at] = zlib.crc32(pages[at])
    if n % 16 == 0:
        os.pwrite(progress, b'%016d' % n, 0)
        time.sleep(0.05)
";

/// What reads much of the disk, and always says the same.
const DISK: &str =
    "echo 3 > /proc/sys/vm/drop_caches; cat /usr/lib/python3*/[a-b]*.py | md5sum | cut -c 1-32";

#[test]
fn machines_go_on_when_their_page_server_is_killed() {
    let Some(guest) = guest() else { return };
    let coppice = Coppice::new().unwrap();
    coppice.boot(&guest, "first", 128).unwrap();
    works(&coppice);
    coppice.json(&["snapshot", "first", "--name", "base"]).unwrap();
    coppice.text(&["rm", "--force", "first"]).unwrap();
    let (done, kills) = (AtomicBool::new(false), AtomicU64::new(0));
    let takeovers = std::thread::scope(|scope| {
        let killer = scope.spawn(|| kill_now_and_then(&coppice, &done, &kills));
        let result = std::panic::catch_unwind(|| grows(&coppice));
        done.store(true, Ordering::Relaxed);
        killer.join().unwrap();
        result.unwrap();
        coppice.json(&["pools"]).unwrap()["takeovers"].as_u64().unwrap()
    });
    let kills = kills.into_inner();
    eprintln!("tried: {kills} kills of a page server under Linux guests, {takeovers} takeovers");
    assert!(takeovers > 0);
    let log = std::fs::read_to_string(coppice.store().join("run/supervisor.log")).unwrap();
    assert!(log.contains("was ended by signal 9; another one took over"), "{log}");
    layers_are_given_back(&coppice);
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
    gives_up(&coppice);
}

fn sh(coppice: &Coppice, machine: &str, script: &str) -> String {
    coppice.text(&["exec", machine, "--", "sh", "-c", script]).unwrap().trim().to_owned()
}

fn works(coppice: &Coppice) {
    let keeper = coppice.scratch("keeper.py");
    std::fs::write(&keeper, KEEPER).unwrap();
    coppice.text(&["cp", keeper.to_str().unwrap(), "first:/root/keeper.py"]).unwrap();
    sh(coppice, "first", "python3 /root/keeper.py </dev/null >/root/keeper.log 2>&1 &");
    let begun = Instant::now();
    while sh(coppice, "first", "test -e /dev/shm/rounds && echo yes || true") != "yes" {
        let log = sh(coppice, "first", "cat /root/keeper.log");
        assert!(begun.elapsed() < Duration::from_secs(120), "{log}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// How far the process of a machine is; nothing that it looked at was wrong.
fn rounds(coppice: &Coppice, machine: &str) -> u64 {
    let look = "test ! -e /dev/shm/wrong || { cat /dev/shm/wrong; exit 1; }; cat /dev/shm/rounds";
    sh(coppice, machine, look).parse().unwrap()
}

fn kill_page_server(coppice: &Coppice) -> Option<u32> {
    let pid = coppice.json(&["pools"]).ok()?["pid"].as_u64()?;
    let pid = u32::try_from(pid).ok().filter(|pid| *pid != 0)?;
    let raw = rustix::process::Pid::from_raw(i32::try_from(pid).ok()?)?;
    rustix::process::kill_process(raw, rustix::process::Signal::KILL).ok()?;
    Some(pid)
}

/// Each page server lives for a while: one that never does is given up.
fn kill_now_and_then(coppice: &Coppice, done: &AtomicBool, kills: &AtomicU64) {
    let long = std::env::var_os("COPPICE_LONG").is_some();
    for number in 0.. {
        if done.load(Ordering::Relaxed) && (!long || number >= 200) {
            return;
        }
        std::thread::sleep(Duration::from_millis(150 + number * 67 % 300));
        if kill_page_server(coppice).is_some() {
            kills.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// All that machines do, while it is killed.
fn grows(coppice: &Coppice) {
    coppice.json(&["run", "base", "--name", "trunk"]).unwrap();
    let before = rounds(coppice, "trunk");
    let disk = sh(coppice, "trunk", DISK);
    coppice.json(&["snapshot", "trunk", "--name", "later"]).unwrap();
    coppice.json(&["fork", "trunk", "--name", "bough", "--count", "2"]).unwrap();
    // An instant after which nothing is waited for: forks of what is not copied.
    coppice.json(&["fork", "bough-1", "--name", "spray"]).unwrap();
    coppice.text(&["rm", "--force", "bough-1"]).unwrap();
    coppice.json(&["snapshot", "spray", "--name", "deep"]).unwrap();
    goes_on(coppice, "spray", before, &disk);
    coppice.text(&["rm", "--force", "spray"]).unwrap();
    goes_on(coppice, "bough-2", before, &disk);
    coppice.text(&["rm", "--force", "bough-2"]).unwrap();
    goes_on(coppice, "trunk", before, &disk);
    coppice.text(&["rm", "--force", "trunk"]).unwrap();
    for snapshot in ["later", "deep"] {
        coppice.json(&["run", snapshot, "--name", "again"]).unwrap();
        goes_on(coppice, "again", before, &disk);
        coppice.text(&["rm", "--force", "again"]).unwrap();
    }
}

/// Its process works, and its disk reads as it did; then it is not needed.
fn goes_on(coppice: &Coppice, machine: &str, before: u64, disk: &str) {
    let at = rounds(coppice, machine);
    assert!(at >= before, "{machine} is at {at}, its origin was at {before}");
    assert_eq!(sh(coppice, machine, DISK), disk, "the disk of {machine}");
    let begun = Instant::now();
    while rounds(coppice, machine) == at {
        assert!(begun.elapsed() < Duration::from_secs(300), "{machine} stands still");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn layers_are_given_back(coppice: &Coppice) {
    let begun = Instant::now();
    loop {
        let pools = coppice.json(&["pools"]).unwrap();
        let all = pools["pools"].as_array().unwrap();
        if !all.iter().any(|pool| pool["root"].as_str().unwrap().starts_with("live-layer")) {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{pools}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// One that is never of use is given up; its machines say so, and the next one
/// that is needed begins anew.
fn gives_up(coppice: &Coppice) {
    coppice.json(&["run", "base", "--name", "bereft"]).unwrap();
    let failed = || {
        let all = coppice.json(&["ps"]).unwrap();
        let machines = all["machines"].as_array().unwrap();
        let bereft = machines.iter().find(|machine| machine["name"] == "bereft").unwrap();
        (bereft["state"] == "failed").then(|| bereft["reason"].as_str().unwrap().to_owned())
    };
    // Not through the command line, which would be too slow.
    let supervisor = coppice.supervisor().unwrap();
    let begun = Instant::now();
    let reason = loop {
        page_servers_of(supervisor).into_iter().for_each(|pid| {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            let _gone = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        });
        if begun.elapsed().as_millis() % 100 < 2
            && let Some(reason) = failed()
        {
            break reason;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "it is never given up");
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(reason.contains("page server") && reason.contains("given up"), "{reason}");
    coppice.text(&["rm", "--force", "bereft"]).unwrap();
    coppice.json(&["run", "base", "--name", "again"]).unwrap();
    rounds(coppice, "again");
    coppice.text(&["rm", "--force", "again"]).unwrap();
}

/// The children of a process that are page servers.
fn page_servers_of(supervisor: u32) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let read =
            |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let parent = read("stat")
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split(' ').nth(1).and_then(|parent| parent.parse::<u32>().ok()));
        if parent == Some(supervisor) && read("cmdline").contains("internal-pager") {
            found.push(pid);
        }
    }
    found
}
