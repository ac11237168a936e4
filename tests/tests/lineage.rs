//! What differs, what descends from what, and what it costs, through the
//! command line.

use std::fs::File;
use std::os::unix::fs::FileExt;

use coppice_tests::Coppice;

fn noise(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn differences_and_bills_are_exact() {
    let coppice = Coppice::new().unwrap();
    let disk = coppice.scratch("disk");
    let file = File::create(&disk).unwrap();
    file.write_all_at(&noise(4 << 20, 1), 0).unwrap();
    let path = disk.to_str().unwrap();
    coppice.text(&["import", path, "--name", "one"]).unwrap();
    file.write_all_at(&noise(8192, 2), 1 << 20).unwrap();
    file.write_all_at(&noise(100, 3), (2 << 20) + 5000).unwrap();
    coppice.text(&["import", path, "--name", "two"]).unwrap();

    let found = coppice.json(&["diff", "one", "two"]).unwrap();
    let part = &found["parts"][0];
    assert_eq!(part["part"], "disk0");
    assert_eq!(part["changed_bytes"], 3 * 4096, "{found}");
    assert_eq!(part["extents"][0]["offset"], 1 << 20);
    assert_eq!(part["extents"][0]["length"], 8192);
    assert_eq!(part["extents"][1]["offset"], (2 << 20) + 4096);
    assert_eq!(part["extents"].as_array().unwrap().len(), 2);
    assert!(coppice.text(&["diff", "one", "one"]).unwrap().contains("disk0: equal"));
    assert!(coppice.text(&["diff", "one", "two"]).unwrap().contains("in 2 extents"));

    let usage =
        coppice.json(&["show", "two", "--usage"]).unwrap()["usage"]["snapshot"]["own"].clone();
    assert_eq!(usage["exclusive_bytes"], 3 * 4096, "{usage}");
    assert_eq!(usage["referenced_bytes"], 4 << 20);
    let stats = coppice.json(&["stats", "--usage"]).unwrap();
    let store = &stats["usage"]["store"];
    assert_eq!(store["stored_bytes"], stats["stored_bytes"], "{stats}");
    let sum = ["page_bytes", "metadata_bytes", "table_bytes", "root_log_bytes"]
        .map(|field| store[field].as_u64().unwrap());
    assert_eq!(sum.iter().sum::<u64>(), stats["stored_bytes"].as_u64().unwrap());
    assert_eq!(store["dead_bytes"], 0);

    // What the bill says is what a collection frees, table rows apart.
    let frees = usage["frees_after_repack"].as_u64().unwrap();
    assert_eq!(
        usage["frees_now"],
        coppice.json(&["show", "two"]).unwrap()["snapshot"]["stored_bytes"]
    );
    coppice.text(&["rmi", "two"]).unwrap();
    let dead =
        coppice.json(&["stats", "--usage"]).unwrap()["usage"]["store"]["dead_bytes"].as_u64();
    assert_eq!(dead, Some(frees));
    let done = coppice.json(&["gc"]).unwrap();
    assert_eq!(done["freed_bytes"], usage["frees_now"]);

    let tree = coppice.text(&["tree", "--usage"]).unwrap();
    assert!(tree.contains("one") && tree.contains("AFTER REPACK"), "{tree}");
    assert_eq!(coppice.json(&["tree"]).unwrap()["snapshots"].as_array().unwrap().len(), 1);
    let line = coppice.refusal(&["diff", "one", "ghost"]).unwrap();
    assert!(line.contains("no snapshot named ghost"), "{line}");
    coppice.text(&["serve", "--stop"]).unwrap();
}
