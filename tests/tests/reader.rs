//! A store as a stranger reads it: the program in `tests/reader`, written from
//! `docs/format.md` alone, must list and export what the binary stored.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use coppice_tests::Coppice;
use serde_json::Value;

const READER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/reader/coppice_reader.py");

/// Python with the reader's packages.
fn python() -> Command {
    let mut command = Command::new("python3");
    if let Some(packages) = std::env::var_os("COPPICE_READER_PACKAGES") {
        command.env("PYTHONPATH", packages);
    }
    command
}

/// Whether there is one; if not, says why the test is skipped.
fn has_python() -> bool {
    let asked = python().args(["-c", "import blake3, zstandard"]).output();
    if asked.is_ok_and(|done| done.status.success()) {
        return true;
    }
    let reason = "python3 lacks blake3 or zstandard: `cargo xtask test` installs them";
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI must not skip: {reason}");
    eprintln!("skipped: {reason}");
    false
}

fn read(store: &Path, arguments: &[&str]) -> Output {
    python().arg(READER).arg(store).args(arguments).output().unwrap()
}

fn json(done: &Output) -> Value {
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{errors}");
    serde_json::from_slice(&done.stdout).unwrap()
}

/// A sparse disk with islands of pages that differ, and a partial last page.
fn make_disk(path: &Path) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len((96 << 20) + 777).unwrap();
    for page in (0_u64..1500).chain(9000..9400) {
        file.write_all_at(format!("page {page:>8}").repeat(300).as_bytes(), page * 4096).unwrap();
    }
    file.write_all_at(b"the end", (96 << 20) + 770).unwrap();
    file
}

#[test]
fn a_reader_written_from_the_page_exports_the_same_bytes() {
    if !has_python() {
        return;
    }
    let coppice = Coppice::new().unwrap();
    let disk = coppice.scratch("disk");
    let file = make_disk(&disk);
    let import = |path: &Path, name| {
        coppice.text(&["import", path.to_str().unwrap(), "--name", name]).unwrap();
    };
    import(&disk, "first");
    let copy = coppice.scratch("first");
    std::fs::copy(&disk, &copy).unwrap();
    // A page here and there: most nodes and chunks are those of the first version.
    for page in [3_u64, 140, 1111, 9001, 20_000] {
        file.write_all_at(b"changed", page * 4096).unwrap();
    }
    import(&disk, "second");
    coppice.text(&["tag", "first", "kept"]).unwrap();
    coppice.text(&["rmi", "first"]).unwrap();
    coppice.text(&["serve", "--stop"]).unwrap();

    let store = coppice.store();
    let listed = json(&read(&store, &["list"]));
    let names: Vec<&Value> = listed.as_array().unwrap().iter().map(|s| &s["names"]).collect();
    assert_eq!(names, [&serde_json::json!(["kept"]), &serde_json::json!(["second"])]);
    let counts = json(&read(&store, &["verify"]));
    println!("the reader verified {counts}");
    assert_eq!(counts["images"], 2, "{counts}");
    for (name, original) in [("kept", &copy), ("second", &disk)] {
        let out = coppice.scratch(&format!("out-{name}"));
        let done = read(&store, &["export", name, out.to_str().unwrap()]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(std::fs::read(&out).unwrap() == std::fs::read(original).unwrap(), "{name}");
    }
    refuses_a_flipped_bit(&store);
}

/// Text with a hole in it, and the same behind an insertion.
fn stream_versions() -> [Vec<u8>; 2] {
    let mut bytes: Vec<u8> = (0..150_000_u64)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect();
    bytes[300_000..700_000].fill(0);
    let mut longer = bytes.clone();
    longer.splice(5000..5000, *b"inserted");
    [bytes, longer]
}

#[test]
fn a_reader_written_from_the_page_exports_streams_and_cuts_them_again() {
    if !has_python() {
        return;
    }
    let coppice = Coppice::new().unwrap();
    let mut roots = Vec::new();
    let file = coppice.scratch("file");
    let [first, second] = stream_versions();
    let versions =
        [("first", first), ("second", second), ("short", b"x".to_vec()), ("none", vec![])];
    for (name, bytes) in &versions {
        std::fs::write(&file, bytes).unwrap();
        let arguments = ["import", file.to_str().unwrap(), "--name", name, "--as", "stream"];
        roots.push(coppice.json(&arguments).unwrap()["root"].clone());
    }
    coppice.text(&["serve", "--stop"]).unwrap();
    let store = coppice.store();
    let counts = json(&read(&store, &["verify"]));
    println!("the reader verified {counts}");
    assert_eq!(counts["images"], 4, "{counts}");
    for ((name, bytes), root) in versions.iter().zip(&roots) {
        let out = coppice.scratch(&format!("out-{name}"));
        let done = read(&store, &["export", name, out.to_str().unwrap()]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(std::fs::read(&out).unwrap() == *bytes, "{name}");
        assert_eq!(json(&read(&store, &["root", name]))["root"], *root, "{name}");
    }
    refuses_a_flipped_bit(&store);
}

fn refuses_a_flipped_bit(store: &Path) {
    let pack = store.join("packs/000000000001.pack");
    let file = File::options().read(true).write(true).open(pack).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 1], middle).unwrap();
    assert_eq!(read(store, &["verify"]).status.code(), Some(1));
}

#[test]
fn the_golden_store_is_what_the_page_says() {
    if !has_python() {
        return;
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/golden/format-1");
    let counts = json(&read(&golden, &["verify"]));
    assert_eq!(counts["packs"], 3);
    assert!(counts["patches"].as_u64().unwrap() > 0, "{counts}");
}
