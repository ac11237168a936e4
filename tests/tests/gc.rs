//! Garbage collection through the command line, beside a store that is used.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::path::Path;

use coppice_tests::Coppice;

/// Bytes that do not compress and repeat nowhere.
fn noise(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

fn same_bytes(left: &Path, right: &Path) -> bool {
    std::fs::read(left).unwrap() == std::fs::read(right).unwrap()
}

#[test]
fn removed_bytes_are_freed_and_the_rest_stays() {
    let coppice = Coppice::new().unwrap();
    let (kept, gone) = (coppice.scratch("kept"), coppice.scratch("gone"));
    std::fs::write(&kept, noise(3 << 20, 1)).unwrap();
    std::fs::write(&gone, noise(5 << 20, 2)).unwrap();
    for (file, name) in [(&kept, "kept"), (&gone, "gone")] {
        coppice.text(&["import", file.to_str().unwrap(), "--name", name]).unwrap();
    }
    assert_eq!(coppice.json(&["gc", "--dry-run"]).unwrap()["freed_now_bytes"], 0);
    coppice.text(&["rmi", "gone"]).unwrap();
    let plan = coppice.json(&["gc", "--dry-run"]).unwrap();
    assert!(plan["freed_now_bytes"].as_u64().unwrap() > 5 << 20, "{plan}");
    assert!(coppice.text(&["gc", "--dry-run"]).unwrap().contains("drop"));
    let done = coppice.json(&["gc"]).unwrap();
    assert_eq!(done["freed_bytes"], plan["freed_now_bytes"], "{done}");
    assert_eq!(done["dropped_packs"], 1);
    for figure in ["gathered_bytes", "kept_twice_bytes"] {
        assert_eq!((&plan[figure], &done[figure]), (&0.into(), &0.into()), "{figure}");
    }
    assert_eq!(coppice.json(&["stats"]).unwrap()["kept_twice_bytes"], 0);
    let usage = coppice.json(&["stats", "--usage"]).unwrap();
    assert_eq!(
        (&usage["usage"]["store"]["dead_bytes"], &usage["usage"]["nodes_walked"]),
        (&0.into(), &0.into()),
        "{usage}"
    );
    let stats = coppice.json(&["stats"]).unwrap();
    assert!(stats["stored_bytes"].as_u64().unwrap() < 4 << 20, "{stats}");
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
    let out = coppice.scratch("out");
    coppice.text(&["export", "kept", out.to_str().unwrap()]).unwrap();
    assert!(same_bytes(&kept, &out));
    // What was collected can come back.
    coppice.text(&["import", gone.to_str().unwrap(), "--name", "gone"]).unwrap();
    let out = coppice.scratch("out2");
    coppice.text(&["export", "gone", out.to_str().unwrap()]).unwrap();
    assert!(same_bytes(&gone, &out));
    assert_eq!(coppice.run(&["gc", "--min-dead", "101"]).unwrap().status.code(), Some(2));
    coppice.text(&["serve", "--stop"]).unwrap();
}
