//! Machines that leave the host and come back: cold snapshots, which boot
//! anew from their disks.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use coppice_tests::{Coppice, Guest, guest};
use serde_json::Value;

#[test]
fn machines_leave_the_host_and_come_back() {
    let Some(guest) = guest() else { return };
    let coppice = Coppice::new().unwrap();
    boots(&coppice, &guest);
    disks_are_captured_alone(&coppice, &guest);
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
    run.extend(["--disk", "root", "--disk", "spare", "--memory", "128"]);
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

/// A fork of a machine snapshot is captured cold; what boots from that is
/// another machine with the same disks, however it is made.
fn a_cold_snapshot_boots_anew(coppice: &Coppice) {
    coppice.json(&["run", "whole", "--name", "twig"]).unwrap();
    sh(coppice, "twig", "echo twig > /root/mark; rm -f /root/gone");
    coppice.text(&["pause", "twig"]).unwrap();
    let done = coppice.json(&["snapshot", "twig", "--cold", "--name", "seed"]).unwrap();
    assert_eq!(done["consistency"], "crash", "nobody in a paused machine flushes: {done}");
    coppice.text(&["resume", "twig"]).unwrap();
    coppice.json(&["snapshot", "twig", "--cold", "--name", "flushed"]).unwrap();
    for machine in ["twig", "web"] {
        coppice.text(&["rm", "--force", machine]).unwrap();
    }
    for gone in ["whole", "cold", "root", "seed"] {
        coppice.text(&["rmi", gone]).unwrap();
    }
    coppice.text(&["gc", "--min-dead", "0"]).unwrap();
    coppice.json(&["run", "flushed", "--name", "anew"]).unwrap();
    assert_eq!(
        sh(coppice, "anew", "cat /root/mark; cat /proc/sys/kernel/hostname"),
        "twig\nanew\n"
    );
    assert_eq!(sh(coppice, "anew", "dd if=/dev/vdb bs=4096 skip=3 count=1 | head -c 6"), "change");
    let tree = coppice.text(&["tree"]).unwrap();
    assert!(tree.contains("flushed") && tree.contains("cold"), "{tree}");
}
