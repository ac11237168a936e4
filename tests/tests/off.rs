//! Machines that leave the host and come back: cold snapshots, which boot
//! anew from their disks; machines that are paused off the host; machines that
//! are shut down and started again.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::time::{SystemTime, UNIX_EPOCH};

use coppice_tests::{Coppice, Guest, guest};
use serde_json::Value;

#[test]
fn machines_leave_the_host_and_come_back() {
    let Some(guest) = guest() else { return };
    let coppice = Coppice::new().unwrap();
    boots(&coppice, &guest);
    disks_are_captured_alone(&coppice, &guest);
    a_machine_off_the_host_comes_back_as_it_was(&coppice);
    what_is_off_the_host_is_captured_and_forked(&coppice);
    a_machine_that_was_shut_down_starts_again(&coppice);
    a_cold_snapshot_boots_anew(&coppice);
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
}

fn boots(coppice: &Coppice, guest: &Guest) {
    coppice.text(&["import", guest.disk.to_str().unwrap(), "--name", "root"]).unwrap();
    let spare = coppice.scratch("spare");
    std::fs::write(&spare, vec![7; 1 << 20]).unwrap();
    coppice.text(&["import", spare.to_str().unwrap(), "--name", "spare"]).unwrap();
    // The kernel file may change and go: what is kept is what was booted.
    let kernel = coppice.scratch("kernel");
    std::fs::copy(&guest.kernel, &kernel).unwrap();
    let mut run = vec!["run", "--name", "web", "--kernel", kernel.to_str().unwrap()];
    run.extend(["--disk", "root", "--disk", "spare", "--memory", "96"]);
    coppice.json(&run).unwrap();
    std::fs::write(&kernel, "another one").unwrap();
    std::fs::remove_file(&kernel).unwrap();
}

fn sh(coppice: &Coppice, machine: &str, script: &str) -> String {
    coppice.text(&["exec", machine, "--", "sh", "-c", script]).unwrap()
}

fn parts(shown: &Value) -> Vec<&str> {
    shown["images"].as_array().unwrap().iter().map(|i| i["part"].as_str().unwrap()).collect()
}

/// What the guest has not flushed itself is there too, because it is asked to;
/// the machine goes on, and later snapshots build on the disks.
fn disks_are_captured_alone(coppice: &Coppice, guest: &Guest) {
    sh(coppice, "web", "echo one > /root/mark; printf change | dd of=/dev/vdb bs=4096 seek=3");
    let done = coppice.json(&["snapshot", "web", "--cold", "--name", "cold"]).unwrap();
    assert_eq!(done["consistency"], "flushed", "{done}");
    assert!(done["pause_us"].as_u64().unwrap() > 0, "{done}");
    let shown = coppice.json(&["show", "cold"]).unwrap();
    assert_eq!(shown["snapshot"]["kind"], "cold");
    assert_eq!(parts(&shown), ["disk0", "disk1", "kernel"]);
    assert!(shown["machine"]["cmdline"].as_str().unwrap().contains("root=/dev/vda"), "{shown}");
    let kernel = coppice.scratch("kernel-again");
    coppice.text(&["export", "cold", "--kernel", kernel.to_str().unwrap()]).unwrap();
    assert_eq!(std::fs::read(kernel).unwrap(), std::fs::read(&guest.kernel).unwrap());
    let block = coppice.run(&["read", "cold", "--disk", "1", "12288:8"]).unwrap();
    assert_eq!(block.stdout, b"change\x07\x07");

    sh(coppice, "web", "echo two > /root/mark");
    let whole = coppice.json(&["snapshot", "web", "--name", "whole"]).unwrap();
    assert_eq!(whole["consistency"], "whole", "{whole}");
    let shown = coppice.json(&["show", "whole"]).unwrap();
    assert_eq!(parts(&shown), ["memory", "disk0", "disk1", "state", "kernel"]);
    // The kernel is stored once.
    assert!(coppice.text(&["diff", "cold", "whole"]).unwrap().contains("kernel: equal"));
    assert_eq!(sh(coppice, "web", "cat /root/mark"), "two\n");
}

fn machine(coppice: &Coppice, name: &str) -> Value {
    let all = coppice.json(&["ps"]).unwrap();
    all["machines"].as_array().unwrap().iter().find(|line| line["name"] == name).unwrap().clone()
}

/// The ids of snapshots that nobody has named.
fn unnamed(coppice: &Coppice) -> Vec<String> {
    let all = coppice.json(&["snapshots"]).unwrap();
    let lines = all["snapshots"].as_array().unwrap().iter();
    lines
        .filter(|line| line["name"] == line["id"])
        .map(|line| line["id"].as_str().unwrap().to_owned())
        .collect()
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

fn kill_supervisor(coppice: &Coppice) {
    let pid = i32::try_from(coppice.supervisor().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// Its processes go on and it is no fork of itself, whatever happens to the
/// store and to the supervisor meanwhile.
fn a_machine_off_the_host_comes_back_as_it_was(coppice: &Coppice) {
    let start = "echo kept > /dev/shm/mark; sleep 100000 </dev/null >/dev/null 2>&1 & echo $! > /dev/shm/pid; head -c 3000000 /dev/urandom > /dev/shm/much; md5sum < /dev/shm/much > /dev/shm/sum; cat /etc/machine-id /proc/sys/kernel/random/boot_id";
    let before = sh(coppice, "web", start);
    coppice.text(&["pause", "web"]).unwrap();
    let off = machine(coppice, "web");
    assert_eq!((&off["state"], &off["pid"]), (&"suspended".into(), &Value::Null), "{off}");
    coppice.text(&["pause", "web"]).unwrap();
    let [id] = unnamed(coppice).try_into().unwrap();
    for (refused, why) in [
        (vec!["exec", "web", "--", "true"], "coppice resume web"),
        (vec!["stop", "web"], "web is suspended"),
        (vec!["start", "web"], "web is suspended"),
        (vec!["rm", "web"], "web is suspended"),
        (vec!["rmi", id.as_str()], "all there is of web"),
    ] {
        let line = coppice.refusal(&refused).unwrap();
        assert!(line.contains(why), "{line}");
    }
    coppice.text(&["rmi", "whole"]).unwrap();
    coppice.text(&["gc", "--min-dead", "0"]).unwrap();
    kill_supervisor(coppice);
    assert_eq!(machine(coppice, "web")["state"], "suspended");
    coppice.text(&["serve", "--stop"]).unwrap();
    coppice.text(&["resume", "web"]).unwrap();
    assert_eq!(machine(coppice, "web")["state"], "running");
    // What it came from stays until the store has something later of it.
    assert_eq!(unnamed(coppice), [id.as_str()]);
    sh(coppice, "web", "echo lost > /dev/shm/mark");
    kill_supervisor(coppice);
    assert_eq!(machine(coppice, "web")["state"], "failed");
    let line = coppice.refusal(&["exec", "web", "--", "true"]).unwrap();
    assert!(line.contains("coppice resume web"), "{line}");
    coppice.text(&["gc", "--min-dead", "0"]).unwrap();
    coppice.text(&["resume", "web"]).unwrap();
    let look = "kill -0 $(cat /dev/shm/pid) && md5sum < /dev/shm/much | cmp - /dev/shm/sum && cat /etc/machine-id /proc/sys/kernel/random/boot_id; date +%s.%N; cat /dev/shm/mark";
    let began = now();
    let after = sh(coppice, "web", look);
    let lines: Vec<&str> = after.lines().collect();
    assert_eq!(lines[..2].join("\n"), before.trim());
    let theirs: f64 = lines[2].parse().unwrap();
    assert!(theirs > began - 1.0 && theirs < now() + 1.0, "{began} {theirs}");
    assert_eq!(lines[3], "kept");
    // In its place, it stays itself too.
    coppice.text(&["pause", "--in-memory", "web"]).unwrap();
    assert_eq!(machine(coppice, "web")["state"], "paused");
    coppice.text(&["resume", "web"]).unwrap();
    assert_eq!(sh(coppice, "web", "cat /etc/machine-id").trim(), lines[0]);
}

/// Naming what a machine is takes no time; forks of it are others.
fn what_is_off_the_host_is_captured_and_forked(coppice: &Coppice) {
    let id = sh(coppice, "web", "echo two > /root/mark; cat /etc/machine-id");
    coppice.text(&["pause", "web"]).unwrap();
    let named = coppice.json(&["snapshot", "web", "--name", "whole"]).unwrap();
    assert_eq!(named["consistency"], "whole", "{named}");
    let cold = coppice.json(&["snapshot", "web", "--cold", "--name", "cut"]).unwrap();
    assert_eq!(cold["consistency"], "crash", "{cold}");
    assert_eq!(parts(&coppice.json(&["show", "cut"]).unwrap()), ["disk0", "disk1", "kernel"]);
    coppice.json(&["fork", "web", "--name", "shoot"]).unwrap();
    assert_eq!(
        sh(coppice, "shoot", "cat /dev/shm/mark /proc/sys/kernel/hostname"),
        "kept\nshoot\n"
    );
    assert_ne!(sh(coppice, "shoot", "cat /etc/machine-id"), id);
    coppice.text(&["rm", "--force", "shoot"]).unwrap();
    coppice.text(&["resume", "web"]).unwrap();
    assert_eq!(sh(coppice, "web", "cat /root/mark /etc/machine-id"), format!("two\n{id}"));
    coppice.text(&["rmi", "cut"]).unwrap();
}

/// What its guest left on the disks is there, whoever ended it.
fn a_machine_that_was_shut_down_starts_again(coppice: &Coppice) {
    let before = sh(
        coppice,
        "web",
        "echo off > /root/off; cat /etc/machine-id /proc/sys/kernel/random/boot_id",
    );
    coppice.text(&["stop", "web"]).unwrap();
    let line = coppice.refusal(&["exec", "web", "--", "true"]).unwrap();
    assert!(line.contains("web is stopped") && line.contains("coppice start web"), "{line}");
    let done = coppice.json(&["snapshot", "web", "--cold", "--name", "off"]).unwrap();
    assert_eq!(done["consistency"], "stopped", "{done}");
    coppice.text(&["serve", "--stop"]).unwrap();
    coppice.json(&["start", "web"]).unwrap();
    let after = sh(coppice, "web", "cat /etc/machine-id /proc/sys/kernel/random/boot_id /root/off");
    let (before, after): (Vec<&str>, Vec<&str>) =
        (before.lines().collect(), after.lines().collect());
    assert_eq!((after[0], after[2]), (before[0], "off"));
    assert_ne!(after[1], before[1]);
    assert!(coppice.text(&["logs", "web"]).is_ok());
    let names = ["off", "root", "spare", "cold", "whole"];
    let all = coppice.json(&["snapshots"]).unwrap();
    for line in all["snapshots"].as_array().unwrap() {
        assert!(names.contains(&line["name"].as_str().unwrap()), "{line}");
    }
}

/// A fork of a machine snapshot is captured cold; what boots from that is
/// another machine with the same disks, however it is made.
fn a_cold_snapshot_boots_anew(coppice: &Coppice) {
    coppice.json(&["run", "whole", "--name", "twig"]).unwrap();
    sh(coppice, "twig", "echo twig > /root/mark; rm -f /root/gone");
    coppice.text(&["pause", "--in-memory", "twig"]).unwrap();
    let done = coppice.json(&["snapshot", "twig", "--cold", "--name", "seed"]).unwrap();
    assert_eq!(done["consistency"], "crash", "nobody in a paused machine flushes: {done}");
    coppice.text(&["resume", "twig"]).unwrap();
    coppice.json(&["snapshot", "twig", "--cold", "--name", "flushed"]).unwrap();
    for machine in ["twig", "web"] {
        coppice.text(&["rm", "--force", machine]).unwrap();
    }
    for gone in ["whole", "cold", "off", "root", "seed"] {
        coppice.text(&["rmi", gone]).unwrap();
    }
    coppice.text(&["gc", "--min-dead", "0"]).unwrap();
    coppice.json(&["run", "flushed", "--name", "anew"]).unwrap();
    assert_eq!(
        sh(coppice, "anew", "cat /root/mark; cat /proc/sys/kernel/hostname"),
        "twig\nanew\n"
    );
    assert_eq!(sh(coppice, "anew", "dd if=/dev/vdb bs=4096 skip=3 count=1 | head -c 6"), "change");
    // Equal machines are not one: what is left of one outlives the other.
    let twins = ["fork", "flushed", "--count", "2", "--paused", "--name", "twin"];
    coppice.json(&twins).unwrap();
    for twin in ["twin-1", "twin-2"] {
        coppice.text(&["stop", twin]).unwrap();
    }
    assert_eq!(unnamed(coppice).len(), 2);
    coppice.text(&["rm", "twin-1"]).unwrap();
    coppice.text(&["gc", "--min-dead", "0"]).unwrap();
    coppice.json(&["start", "twin-2"]).unwrap();
    assert_eq!(sh(coppice, "twin-2", "cat /root/mark"), "twig\n");
    let tree = coppice.text(&["tree"]).unwrap();
    assert!(tree.contains("flushed") && tree.contains("cold"), "{tree}");
}
