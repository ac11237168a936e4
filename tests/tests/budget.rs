//! A Linux guest in a budget that is a fraction of what it needs: every page
//! comes and goes many times, and every answer is the same.

use coppice_tests::{Coppice, guest};

/// Reads files and computes: much more than the budget holds.
const WORK: &str =
    "sha256sum /usr/bin/python3 /bin/sh; python3 -c 'print(sum(i * i for i in range(9999)))'";

#[test]
fn a_budget_that_is_too_small_makes_slow_and_not_wrong() {
    let Some(guest) = guest() else { return };
    let coppice = Coppice::new().unwrap();
    coppice.boot(&guest, "parent", 256).unwrap();
    let answer = coppice.text(&["exec", "parent", "--", "sh", "-c", WORK]).unwrap();
    coppice.text(&["snapshot", "parent", "--name", "instant"]).unwrap();
    coppice.text(&["serve", "--stop"]).unwrap();

    let started = coppice.command().env("COPPICE_POOL_MEMORY", "4").arg("stats").output().unwrap();
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    coppice.text(&["fork", "instant", "--count", "2", "--name", "small"]).unwrap();
    std::thread::scope(|scope| {
        for name in ["small-1", "small-2"] {
            let (coppice, answer) = (&coppice, &answer);
            scope.spawn(move || {
                let again = coppice.text(&["exec", name, "--", "sh", "-c", WORK]).unwrap();
                assert_eq!(&again, answer, "{name}");
            });
        }
    });
    let pools = coppice.json(&["pools"]).unwrap();
    assert_eq!(pools["budget_bytes"], 4 << 20);
    let dropped = |pool: &serde_json::Value| pool["evicted_pages"].as_u64().unwrap();
    let dropped: u64 = pools["pools"].as_array().unwrap().iter().map(dropped).sum();
    assert!(dropped > 1024, "more than the budget came and went: {pools}");
    // What they have written is theirs, and a capture of it is whole.
    coppice.text(&["snapshot", "small-1", "--name", "later"]).unwrap();
    assert!(coppice.json(&["check"]).unwrap()["ok"].as_bool().unwrap());
}
