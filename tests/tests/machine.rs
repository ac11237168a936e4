//! Real machines through the command line. A Linux guest boots once; the
//! chapters below use its snapshot, as every user would.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use coppice_tests::{Coppice, Guest, guest, naive_tree};
use serde_json::Value;

#[test]
fn the_life_of_machines() {
    let Some(guest) = guest() else { return };
    let coppice = Coppice::new().unwrap();
    boots(&coppice, &guest);
    commands_run(&coppice);
    files_travel(&coppice);
    is_captured(&coppice);
    forks_continue_and_diverge(&coppice);
    many_are_made_at_once(&coppice);
    memory_is_the_captured_memory(&coppice);
    increments_are_small(&coppice);
    a_collection_hurts_no_machine(&coppice);
    mistakes_get_one_clear_line(&coppice, &guest);
    stops_and_goes(&coppice);
    a_killed_page_server_hurts_nobody(&coppice);
    survives_a_crash_while_capturing(&coppice);
    a_restore_fetches_what_the_last_one_touched(&coppice);
    a_damaged_chunk_stops_the_machine_that_needs_it(&coppice);
}

fn boots(coppice: &Coppice, guest: &Guest) {
    coppice.text(&["import", guest.disk.to_str().unwrap(), "--name", "root"]).unwrap();
    let kernel = guest.kernel.to_str().unwrap();
    let run = ["run", "--name", "parent", "--kernel", kernel, "--disk", "root", "--memory", "256"];
    let started = coppice.json(&run).unwrap();
    assert_eq!(started["machines"][0]["name"], "parent");
    assert_eq!(coppice.text(&["exec", "parent", "--", "echo", "hello"]).unwrap(), "hello\n");
    assert_eq!(state(coppice, "parent"), "running");
}

fn machine(coppice: &Coppice, name: &str) -> Value {
    let all = coppice.json(&["ps"]).unwrap();
    let found = all["machines"].as_array().unwrap().iter().find(|m| m["name"] == name).cloned();
    found.unwrap_or(Value::Null)
}

fn state(coppice: &Coppice, name: &str) -> String {
    machine(coppice, name)["state"].as_str().unwrap_or("absent").to_owned()
}

fn commands_run(coppice: &Coppice) {
    let output = coppice
        .run(&["exec", "parent", "--", "sh", "-c", "echo out; echo err >&2; exit 7"])
        .unwrap();
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(
        (output.stdout.as_slice(), output.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );

    let mut child = coppice
        .command()
        .args(["exec", "-i", "-e", "WORD=tree", "parent", "--", "sh", "-c", "cat; echo $WORD"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"through\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"through\ntree\n");

    let output = coppice.run(&["exec", "parent", "--", "no-such-command"]).unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no-such-command"));

    signals_pass(coppice);
}

/// The command says that its trap is set before it is sent the signal.
fn signals_pass(coppice: &Coppice) {
    let script = "trap 'exit 42' TERM; echo ready; while :; do sleep 0.1; done";
    let mut child = coppice
        .command()
        .args(["exec", "parent", "--", "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    assert_eq!(line, "ready\n");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(42));
}

fn files_travel(coppice: &Coppice) {
    let tree = coppice.scratch("tree");
    std::fs::create_dir_all(tree.join("inner")).unwrap();
    std::fs::write(tree.join("inner/data"), vec![7; 300_000]).unwrap();
    std::fs::write(tree.join("script"), "#!/bin/sh\n").unwrap();
    std::os::unix::fs::symlink("script", tree.join("link")).unwrap();
    coppice.text(&["cp", tree.to_str().unwrap(), "parent:/root/tree"]).unwrap();
    let sum = coppice.text(&["exec", "parent", "--", "wc", "-c", "/root/tree/inner/data"]).unwrap();
    assert!(sum.starts_with("300000 "), "{sum}");
    let back = coppice.scratch("back");
    coppice.text(&["cp", "parent:/root/tree", back.to_str().unwrap()]).unwrap();
    assert_eq!(std::fs::read(back.join("inner/data")).unwrap(), vec![7; 300_000]);
    assert_eq!(std::fs::read_link(back.join("link")).unwrap(), Path::new("script"));
    let line = coppice.refusal(&["cp", "parent:/no/such", back.to_str().unwrap()]).unwrap();
    assert!(line.contains("/no/such"), "{line}");
}

fn is_captured(coppice: &Coppice) {
    coppice.text(&["exec", "parent", "--", "sh", "-c", "echo parent > /root/mark"]).unwrap();
    let done = coppice.json(&["snapshot", "parent", "--name", "instant"]).unwrap();
    assert!(done["dirty_pages"].as_u64().unwrap() > 1000, "{done}");
    assert!(done["pause_us"].as_u64().unwrap() > 0);
    let shown = coppice.json(&["show", "instant"]).unwrap();
    assert_eq!(shown["snapshot"]["kind"], "machine");
    assert_eq!(shown["snapshot"]["id"], done["id"]);
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

fn forks_continue_and_diverge(coppice: &Coppice) {
    let forked = coppice.json(&["fork", "instant", "--count", "3", "--name", "twig"]).unwrap();
    assert_eq!(forked["machines"].as_array().unwrap().len(), 3);
    let script = "cat /root/mark; cat /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '; date +%s.%N; cat /proc/sys/kernel/hostname";
    let mut seen: Vec<Vec<String>> = Vec::new();
    for name in ["twig-1", "twig-2", "twig-3"] {
        let before = now();
        let text = coppice.text(&["exec", name, "--", "sh", "-c", script]).unwrap();
        let after = now();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        assert_eq!(lines[0], "parent");
        let theirs: f64 = lines[3].parse().unwrap();
        assert!(theirs > before - 1.0 && theirs < after + 1.0, "{before} {theirs} {after}");
        assert_eq!(lines[4], name);
        seen.push(lines);
    }
    for field in [1, 2] {
        assert!(seen[0][field] != seen[1][field] && seen[1][field] != seen[2][field], "{seen:?}");
    }
    coppice.text(&["exec", "twig-2", "--", "sh", "-c", "echo two > /root/mark; sync"]).unwrap();
    for (name, expected) in [("parent", "parent"), ("twig-1", "parent"), ("twig-2", "two")] {
        let text = coppice.text(&["exec", name, "--", "cat", "/root/mark"]).unwrap();
        assert_eq!(text.trim(), expected, "{name}");
    }
    let twig = machine(coppice, "twig-1");
    assert!(twig["shared_bytes"].as_u64() > twig["private_bytes"].as_u64(), "{twig}");
}

fn many_are_made_at_once(coppice: &Coppice) {
    let fork = ["fork", "instant", "--count", "40", "--name", "crowd", "--paused"];
    let forked = coppice.json(&fork).unwrap();
    let made: Vec<&str> = forked["machines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["name"].as_str().unwrap())
        .collect();
    let expected: Vec<String> = (1..=40).map(|number| format!("crowd-{number}")).collect();
    assert_eq!(made, expected);
    assert!(made.iter().all(|name| state(coppice, name) == "paused"));
    coppice.text(&["resume", "crowd-40"]).unwrap();
    let mark = coppice.text(&["exec", "crowd-40", "--", "cat", "/root/mark"]).unwrap();
    assert_eq!(mark.trim(), "parent");
    let remove: Vec<&str> = ["rm", "--force"].into_iter().chain(made).collect();
    coppice.text(&remove).unwrap();
}

fn memory_is_the_captured_memory(coppice: &Coppice) {
    coppice.text(&["fork", "instant", "--name", "still", "--paused"]).unwrap();
    assert_eq!(state(coppice, "still"), "paused");
    let dump = coppice.scratch("still.memory");
    coppice.text(&["dump-memory", "still", dump.to_str().unwrap()]).unwrap();
    let shown = coppice.json(&["show", "instant"]).unwrap();
    let images = shown["images"].as_array().unwrap();
    let memory = images.iter().find(|image| image["part"] == "memory").unwrap();
    assert_eq!(
        naive_tree::root_of(&std::fs::read(&dump).unwrap()),
        memory["root"].as_str().unwrap()
    );
    std::fs::remove_file(dump).unwrap();
    coppice.text(&["rm", "--force", "still"]).unwrap();
}

fn increments_are_small(coppice: &Coppice) {
    let first = coppice.json(&["snapshot", "twig-1", "--name", "twig-a"]).unwrap();
    let second = coppice.json(&["snapshot", "twig-1", "--name", "twig-b"]).unwrap();
    let whole = coppice.json(&["show", "instant"]).unwrap()["snapshot"]["stored_bytes"].as_u64();
    let stored = |done: &Value| done["stored_bytes"].as_u64();
    assert!(stored(&first) < whole, "{first}");
    assert!(stored(&second) <= stored(&first), "{second}");
    // A fork of a running machine captures it first.
    let forked = coppice.json(&["fork", "twig-1", "--name", "leaf"]).unwrap();
    assert!(forked["parent_pause_us"].as_u64().unwrap() > 0);
    assert_eq!(
        coppice.text(&["exec", "leaf", "--", "cat", "/root/mark"]).unwrap().trim(),
        "parent"
    );
    coppice.text(&["rm", "--force", "leaf"]).unwrap();
}

fn mistakes_get_one_clear_line(coppice: &Coppice, guest: &Guest) {
    let line = coppice.refusal(&["fork", "instant", "--name", "twig-1"]).unwrap();
    assert!(line.contains("twig-1 exists already"), "{line}");
    let line = coppice.refusal(&["snapshot", "twig-1", "--name", "instant"]).unwrap();
    assert!(line.contains("instant exists already"), "{line}");
    let line = coppice.refusal(&["run", "missing"]).unwrap();
    assert!(line.contains("no snapshot named missing"), "{line}");
    let line = coppice.refusal(&["run", "root"]).unwrap();
    assert!(line.contains("root is not a machine"), "{line}");
    let kernel = guest.kernel.to_str().unwrap();
    let line = coppice.refusal(&["run", "--kernel", kernel, "--disk", "missing"]).unwrap();
    assert!(line.contains("no disk named missing"), "{line}");
    let not_a_kernel = coppice.scratch("not-a-kernel");
    std::fs::write(&not_a_kernel, "plain text, long enough to be looked at".repeat(100)).unwrap();
    let not_a_kernel = not_a_kernel.to_str().unwrap();
    let line = coppice.refusal(&["run", "--kernel", not_a_kernel, "--disk", "root"]).unwrap();
    assert!(line.contains("kernel"), "{line}");
    assert_eq!(state(coppice, "twig-1"), "running");
}

/// Machines go on, and are captured again, when the snapshots that they came
/// from were removed and collected.
fn a_collection_hurts_no_machine(coppice: &Coppice) {
    coppice.text(&["exec", "twig-3", "--", "sh", "-c", "echo doomed > /root/mark"]).unwrap();
    coppice.text(&["snapshot", "twig-3", "--name", "doomed"]).unwrap();
    coppice.text(&["fork", "doomed", "--name", "orphan"]).unwrap();
    coppice.text(&["rmi", "doomed"]).unwrap();
    let done = coppice.json(&["gc", "--min-dead", "0"]).unwrap();
    assert_eq!(done["damaged_packs"], 0, "{done}");
    assert_eq!(deleted_files_of_the_page_server(coppice), Vec::<String>::new());
    let mark = ["exec", "orphan", "--", "cat", "/root/mark"];
    assert_eq!(coppice.text(&mark).unwrap().trim(), "doomed");
    coppice.text(&["snapshot", "orphan", "--name", "heir"]).unwrap();
    coppice.text(&["rm", "--force", "orphan"]).unwrap();
    coppice.text(&["snapshot", "twig-1", "--name", "twig-c"]).unwrap();
    coppice.text(&["gc", "--min-dead", "0"]).unwrap();
    coppice.text(&["fork", "heir", "--name", "orphan"]).unwrap();
    assert_eq!(coppice.text(&mark).unwrap().trim(), "doomed");
    coppice.text(&["rm", "--force", "orphan"]).unwrap();
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
}

/// Files that take space although nobody can find them.
fn deleted_files_of_the_page_server(coppice: &Coppice) -> Vec<String> {
    let pid = coppice.json(&["pools"]).unwrap()["pid"].as_i64().unwrap();
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    let names = targets.map(|target| target.display().to_string());
    names.filter(|name| name.contains(".pack") && name.contains("(deleted)")).collect()
}

fn stops_and_goes(coppice: &Coppice) {
    coppice.text(&["pause", "--in-memory", "twig-2"]).unwrap();
    assert_eq!(state(coppice, "twig-2"), "paused");
    coppice.text(&["resume", "twig-2"]).unwrap();
    assert_eq!(coppice.text(&["exec", "twig-2", "--", "cat", "/root/mark"]).unwrap().trim(), "two");
    coppice.text(&["stop", "twig-2"]).unwrap();
    assert_eq!(state(coppice, "twig-2"), "stopped");
    let line = coppice.refusal(&["exec", "twig-2", "--", "true"]).unwrap();
    assert!(line.contains("twig-2 is stopped"), "{line}");
    coppice.text(&["logs", "parent"]).unwrap();
    coppice.text(&["rm", "twig-2"]).unwrap();
    assert_eq!(state(coppice, "twig-2"), "absent");
    let line = coppice.refusal(&["rm", "twig-3"]).unwrap();
    assert!(line.contains("stop it first"), "{line}");
}

/// Another one takes over.
fn a_killed_page_server_hurts_nobody(coppice: &Coppice) {
    coppice.text(&["fork", "instant", "--name", "bereft"]).unwrap();
    let pid = coppice.json(&["pools"]).unwrap()["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    coppice.text(&["fork", "instant", "--name", "next"]).unwrap();
    for name in ["bereft", "next"] {
        assert_eq!(
            coppice.text(&["exec", name, "--", "cat", "/root/mark"]).unwrap().trim(),
            "parent"
        );
        coppice.text(&["rm", "--force", name]).unwrap();
    }
}

/// Kills the supervisor, and with it everything, while a capture is under
/// way, at several points of it.
fn survives_a_crash_while_capturing(coppice: &Coppice) {
    for (round, wait_ms) in [5u64, 60, 250].into_iter().enumerate() {
        let name = format!("victim-{round}");
        coppice.text(&["fork", "instant", "--name", &name]).unwrap();
        let fill = "dd if=/dev/urandom of=/dev/shm/fill bs=64k count=20 2>/dev/null";
        coppice.text(&["exec", &name, "--", "sh", "-c", fill]).unwrap();
        let pid = coppice.supervisor().unwrap();
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        let lost = format!("half-{round}");
        let mut capture = coppice
            .command()
            .args(["snapshot", &name, "--name", &lost])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(wait_ms));
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let acknowledged = capture.wait().unwrap().success();

        let found = coppice.json(&["check"]).unwrap();
        assert_eq!(found["ok"], true, "{found}");
        let names: Vec<String> = coppice.json(&["snapshots"]).unwrap()["snapshots"]
            .as_array()
            .unwrap()
            .iter()
            .map(|line| line["name"].as_str().unwrap().to_owned())
            .collect();
        for kept in ["root", "instant", "twig-a", "twig-b"] {
            assert!(names.iter().any(|name| name == kept), "{kept} is lost: {names:?}");
        }
        assert!(!acknowledged || names.contains(&lost), "{lost} was acknowledged: {names:?}");
        assert_eq!(state(coppice, &name), "failed");
        coppice.text(&["rm", &name]).unwrap();
    }
    coppice.text(&["run", "instant", "--name", "after"]).unwrap();
    assert_eq!(
        coppice.text(&["exec", "after", "--", "cat", "/root/mark"]).unwrap().trim(),
        "parent"
    );
    coppice.text(&["rm", "--force", "after"]).unwrap();
}

/// Restores into empty pools; the counters of its memory's pool and how many
/// of its faults had to read the store, when its agent has answered.
fn restored(coppice: &Coppice, arguments: &[&str]) -> (Value, u64) {
    coppice.text(&["serve", "--stop"]).unwrap();
    coppice.json(&[&["run", "instant", "--name", "warm"], arguments].concat()).unwrap();
    assert_eq!(coppice.text(&["exec", "warm", "--", "echo", "up"]).unwrap(), "up\n");
    let pools = coppice.json(&["pools"]).unwrap();
    let busiest = |pool: &&Value| pool["frames_read"].as_u64();
    let pool = pools["pools"].as_array().unwrap().iter().max_by_key(busiest).unwrap().clone();
    let faults = machine(coppice, "warm")["store_faults"].as_u64().unwrap();
    coppice.text(&["rm", "-f", "warm"]).unwrap();
    (pool, faults)
}

fn a_restore_fetches_what_the_last_one_touched(coppice: &Coppice) {
    let sets = coppice.store().join("working-sets");
    drop(std::fs::remove_dir_all(&sets));
    let (first, waited) = restored(coppice, &[]);
    assert_eq!(first["frames_prefetched"], 0);
    let kept = std::fs::read_dir(&sets).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&kept).unwrap();

    let (second, waited_then) = restored(coppice, &[]);
    assert!(second["frames_prefetched"].as_u64().unwrap() > 0, "{second}");
    assert!(waited_then < waited / 2, "{waited_then} of {waited} faults");
    let read = |pool: &Value| pool["bytes_read"].as_f64().unwrap();
    assert!(read(&second) <= 1.2 * read(&first), "{second} {first}");

    let (asked, _) = restored(coppice, &["--no-prefetch"]);
    assert_eq!(asked["frames_prefetched"], 0);
    // A damaged one is as good as none.
    std::fs::write(&kept, &bytes[..bytes.len() / 2]).unwrap();
    let (ruined, _) = restored(coppice, &[]);
    assert_eq!(ruined["frames_prefetched"], 0);
    // Those of snapshots that nobody lists any more go.
    let stray = sets.join("f".repeat(64));
    std::fs::write(&stray, &bytes).unwrap();
    coppice.text(&["tag", "instant", "instant-again"]).unwrap();
    coppice.text(&["rmi", "instant-again"]).unwrap();
    assert!(kept.exists() && !stray.exists());
}

/// Damages every frame of the pack that holds most of the captured memory,
/// then continues from it.
fn a_damaged_chunk_stops_the_machine_that_needs_it(coppice: &Coppice) {
    coppice.text(&["serve", "--stop"]).unwrap();
    for entry in std::fs::read_dir(coppice.store().join("packs")).unwrap() {
        let file =
            std::fs::File::options().read(true).write(true).open(entry.unwrap().path()).unwrap();
        let len = file.metadata().unwrap().len();
        // The front of a pack holds chunks, its end the trees and its own
        // description: those stay whole.
        for offset in (8192..len * 3 / 4).step_by(4096) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).unwrap();
            file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
        }
    }
    let started = coppice.run(&["fork", "instant", "--name", "doomed"]).unwrap();
    if !started.status.success() {
        // Even the machine state was hit, and was not taken for good.
        let text = String::from_utf8_lossy(&started.stderr).into_owned();
        assert!(text.contains("chunk") || text.contains("pack"), "{text}");
        return;
    }
    let output = coppice.run(&["exec", "doomed", "--", "cat", "/root/mark"]).unwrap();
    assert!(!output.status.success());
    let doomed = machine(coppice, "doomed");
    assert_eq!(doomed["state"], "failed", "{doomed}");
    assert!(doomed["reason"].as_str().unwrap().contains("chunk"), "{doomed}");
}
