//! Looking at a store that belongs to somebody else, or cannot be written.

use coppice_tests::Coppice;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        bytes.extend_from_slice(&(state >> 16).to_le_bytes()[..4]);
    }
    bytes.truncate(len);
    bytes
}

#[test]
fn a_store_is_looked_at_beside_its_owner_and_without_one() {
    let coppice = Coppice::new().unwrap();
    let bytes = noise(1, 400 * 4096 + 7);
    let input = coppice.scratch("input");
    std::fs::write(&input, &bytes).unwrap();
    coppice.text(&["import", input.to_str().unwrap(), "--name", "one"]).unwrap();
    let owner = coppice.supervisor().unwrap();
    // Beside the owner, which goes on.
    let listed = coppice.json(&["--read-only", "snapshots"]).unwrap();
    assert_eq!(listed, coppice.json(&["snapshots"]).unwrap());
    let shown = coppice.json(&["--read-only", "show", "one"]).unwrap();
    assert_eq!(shown, coppice.json(&["show", "one"]).unwrap());
    assert_eq!(coppice.json(&["--read-only", "check"]).unwrap()["ok"], true);
    assert_eq!(coppice.supervisor().unwrap(), owner);
    // Without one: none is started, and nothing is written.
    coppice.text(&["serve", "--stop"]).unwrap();
    let before = std::fs::read_dir(coppice.store()).unwrap().count();
    let out = coppice.scratch("out");
    coppice.text(&["--read-only", "export", "one", out.to_str().unwrap()]).unwrap();
    assert!(std::fs::read(&out).unwrap() == bytes);
    assert!(coppice.text(&["--read-only", "tree"]).unwrap().contains("one"));
    assert!(!coppice.store().join("run/supervisor.sock").exists());
    assert_eq!(std::fs::read_dir(coppice.store()).unwrap().count(), before);
    // What would change something is refused in one line.
    for command in [&["tag", "one", "two"][..], &["rmi", "one"], &["gc"], &["ps"], &["serve"]] {
        let line = coppice.refusal(&[&["--read-only"], command].concat()).unwrap();
        assert!(line.contains("leave out --read-only"), "{line}");
    }
    // Some bytes of it, across pages and at the end.
    for options in [&["--read-only"][..], &[]] {
        let read = [options, &["read", "one", "4000:5000", "0:3", "1638400:7"]].concat();
        let output = coppice.run(&read).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let expected = [&bytes[4000..9000], &bytes[..3], &bytes[400 * 4096..]].concat();
        assert!(output.stdout == expected);
    }
    // Nothing is written if one of the extents is not there.
    for outside in ["1638400:8", "18446744073709551615:2"] {
        let output = coppice.run(&["read", "one", "0:3", outside]).unwrap();
        let line = String::from_utf8_lossy(&output.stderr);
        assert!(line.contains("is not in one, which has 1638407 bytes"), "{line}");
        assert!(!output.status.success() && output.stdout.is_empty());
    }
    let output = coppice.run(&["read", "one", "0-3"]).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("OFFSET:LENGTH"));
}
