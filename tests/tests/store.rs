//! The store through the command line: what a user of `import`, `export`,
//! `show`, `stats`, `check` and `rmi` relies on.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use coppice_tests::Coppice;

/// Bytes that do not compress and repeat nowhere.
fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend((seed ^ (seed >> 29)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn same_bytes(left: &Path, right: &Path) -> bool {
    std::fs::read(left).unwrap() == std::fs::read(right).unwrap()
}

#[test]
fn a_disk_comes_out_as_it_went_in_and_only_once() {
    let coppice = Coppice::new().unwrap();
    let disk = coppice.scratch("disk");
    let mut file = File::create(&disk).unwrap();
    file.write_all(&noise(3 << 20, 1)).unwrap();
    file.write_all(&[0; 1 << 20]).unwrap();
    file.write_all(&noise(5000, 2)).unwrap();

    let name = disk.to_str().unwrap();
    let first = coppice.json(&["import", name, "--name", "one"]).unwrap();
    assert_eq!(first["logical_bytes"], (4 << 20) + 5000);
    assert!(first["new_bytes"].as_u64().unwrap() >= 3 << 20);
    assert!(first["root"].as_str().unwrap().len() >= 64);

    let again = coppice.json(&["import", name, "--name", "two"]).unwrap();
    assert_eq!(again["root"], first["root"]);
    assert_eq!(again["new_bytes"], 0);
    assert!(again["stored_bytes"].as_u64().unwrap() < 4096, "{again}");

    let out = coppice.scratch("out");
    coppice.text(&["export", "two", out.to_str().unwrap()]).unwrap();
    assert!(same_bytes(&disk, &out));
    // The same bytes are the same snapshot, under two names.
    assert_eq!(again["id"], first["id"]);
    assert_eq!(coppice.json(&["stats"]).unwrap()["snapshots"].as_u64(), Some(1));
    let listed = coppice.json(&["snapshots"]).unwrap();
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 2);
}

#[test]
fn a_sparse_gibibyte_stays_sparse() {
    let coppice = Coppice::new().unwrap();
    let sparse = coppice.scratch("sparse");
    let file = File::create(&sparse).unwrap();
    file.set_len(1 << 30).unwrap();
    let islands = [0u64, 123_456_789, 700 << 20, (1 << 30) - 5];
    for (index, offset) in islands.into_iter().enumerate() {
        file.write_all_at(&[u8::try_from(index).unwrap() + 1; 5], offset).unwrap();
    }
    let done = coppice.json(&["import", sparse.to_str().unwrap(), "--name", "sparse"]).unwrap();
    assert_eq!(done["logical_bytes"], 1u64 << 30);
    assert!(done["new_bytes"].as_u64().unwrap() <= 4 * 4096);

    let out = coppice.scratch("out");
    coppice.text(&["export", "sparse", out.to_str().unwrap()]).unwrap();
    let metadata = std::fs::metadata(&out).unwrap();
    assert_eq!(metadata.len(), 1 << 30);
    assert!(metadata.blocks() * 512 < 1 << 20, "the copy takes {} blocks", metadata.blocks());
    let copy = File::open(&out).unwrap();
    for (index, offset) in islands.into_iter().enumerate() {
        let mut found = [0; 5];
        copy.read_exact_at(&mut found, offset).unwrap();
        assert_eq!(found, [u8::try_from(index).unwrap() + 1; 5]);
    }
    assert!(std::process::Command::new("cmp").arg(&sparse).arg(&out).status().unwrap().success());
}

#[test]
fn a_flipped_byte_is_found_and_named() {
    let coppice = Coppice::new().unwrap();
    let disk = coppice.scratch("disk");
    std::fs::write(&disk, noise(2 << 20, 3)).unwrap();
    coppice.text(&["import", disk.to_str().unwrap(), "--name", "precious"]).unwrap();
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
    coppice.text(&["serve", "--stop"]).unwrap();

    let pack = largest_pack(&coppice.store().join("packs"));
    let file = File::options().read(true).write(true).open(&pack).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], middle).unwrap();

    let output = coppice.run(&["check"]).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    let stem = pack.file_stem().unwrap().to_str().unwrap();
    assert!(text.contains(stem), "names the pack {stem}: {text}");
    assert!(text.contains("precious"), "names the snapshot: {text}");
    assert!(text.contains("chunk"), "names the chunk: {text}");

    let out = coppice.scratch("out");
    let line = coppice.refusal(&["export", "precious", out.to_str().unwrap()]).unwrap();
    assert!(line.contains(stem), "{line}");
    assert!(!out.exists(), "a damaged export leaves no file");
}

fn largest_pack(folder: &Path) -> std::path::PathBuf {
    let packs = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    packs.max_by_key(|path| std::fs::metadata(path).unwrap().len()).unwrap()
}

#[test]
fn mistakes_get_one_clear_line() {
    let coppice = Coppice::new().unwrap();
    let disk = coppice.scratch("disk");
    std::fs::write(&disk, noise(8192, 4)).unwrap();
    let disk = disk.to_str().unwrap();
    coppice.text(&["import", disk, "--name", "taken"]).unwrap();

    let line = coppice.refusal(&["import", disk, "--name", "taken"]).unwrap();
    assert!(line.contains("taken exists already"), "{line}");
    let line = coppice.refusal(&["import", "/nowhere/disk", "--name", "x"]).unwrap();
    assert!(line.contains("/nowhere/disk"), "{line}");
    let line = coppice.refusal(&["import", disk, "--name", "../x"]).unwrap();
    assert!(line.contains("../x"), "{line}");
    let out = coppice.scratch("out");
    let out = out.to_str().unwrap();
    let line = coppice.refusal(&["export", "missing", out]).unwrap();
    assert!(line.contains("no snapshot named missing"), "{line}");
    assert!(!Path::new(out).exists());
    let line = coppice.refusal(&["export", "taken", disk]).unwrap();
    assert!(line.contains(disk), "an existing file is not overwritten: {line}");
    let line = coppice.refusal(&["exec", "ghost", "--", "true"]).unwrap();
    assert!(line.contains("no machine named ghost"), "{line}");
}

#[test]
fn the_index_is_built_again_from_the_packs() {
    let coppice = Coppice::new().unwrap();
    let line = coppice.refusal(&["rebuild-index"]).unwrap();
    assert!(line.contains("no store"), "{line}");
    let disk = coppice.scratch("disk");
    std::fs::write(&disk, noise(2 << 20, 9)).unwrap();
    coppice.text(&["import", disk.to_str().unwrap(), "--name", "disk"]).unwrap();
    let line = coppice.refusal(&["rebuild-index"]).unwrap();
    assert!(line.contains("serve --stop"), "{line}");
    coppice.text(&["serve", "--stop"]).unwrap();
    let done = (0..100).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        coppice.json(&["rebuild-index"]).ok()
    });
    assert_eq!(done.unwrap()["chunks"], (2 << 20) / 4096);
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
    let again = coppice.json(&["import", disk.to_str().unwrap(), "--name", "again"]).unwrap();
    assert_eq!(again["new_bytes"], 0);
    coppice.text(&["serve", "--stop"]).unwrap();
}

#[test]
fn a_check_reads_as_much_as_it_is_told() {
    let coppice = Coppice::new().unwrap();
    let disk = coppice.scratch("disk");
    std::fs::write(&disk, noise(4 << 20, 8)).unwrap();
    coppice.text(&["import", disk.to_str().unwrap(), "--name", "disk"]).unwrap();
    let structure = coppice.json(&["check", "--structure"]).unwrap();
    assert_eq!((&structure["ok"], &structure["chunks"]), (&true.into(), &0.into()), "{structure}");
    let sample = coppice.json(&["check", "--sample", "50"]).unwrap();
    let seed = sample["scope"]["sample"]["seed"].as_u64().unwrap().to_string();
    let again = coppice.json(&["check", "--sample", "50", "--seed", &seed]).unwrap();
    assert_eq!(sample["skipped_frames"], again["skipped_frames"]);
    assert!(coppice.text(&["check", "--sample", "50", "--seed", &seed]).unwrap().contains(&seed));
    assert_eq!(coppice.json(&["check"]).unwrap()["skipped_frames"], 0);
    coppice.text(&["serve", "--stop"]).unwrap();
}

#[test]
fn wrong_usage_exits_with_2() {
    let coppice = Coppice::new().unwrap();
    let disk = coppice.scratch("disk");
    let disk = disk.to_str().unwrap();
    for wrong in [
        &["frobnicate"][..],
        &["fork", "it", "--count", "0"],
        &["run", "--kernel", disk, "--memory", "1"],
        &["run", "--kernel", disk, "--cpus", "65"],
        &["cp", "one:/a", "two:/b"],
        &["cp", "./a", "./b"],
    ] {
        let output = coppice.run(wrong).unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(!output.stderr.is_empty(), "{wrong:?} is told why");
    }
}

#[test]
fn names_come_and_go() {
    let coppice = Coppice::new().unwrap();
    let disk = coppice.scratch("disk");
    std::fs::write(&disk, noise(8192, 5)).unwrap();
    coppice.text(&["import", disk.to_str().unwrap(), "--name", "a"]).unwrap();
    coppice.text(&["tag", "a", "b"]).unwrap();
    let shown = coppice.json(&["show", "b"]).unwrap();
    assert_eq!(shown["names"], serde_json::json!(["a", "b"]));
    coppice.text(&["rmi", "a"]).unwrap();
    assert!(coppice.refusal(&["show", "a"]).unwrap().contains("no snapshot named a"));
    assert_eq!(coppice.json(&["show", "b"]).unwrap()["snapshot"]["id"], shown["snapshot"]["id"]);

    // What was acknowledged is still there after the supervisor was killed.
    let pid = coppice.supervisor().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let listed = coppice.json(&["snapshots"]).unwrap();
    assert_eq!(listed["snapshots"][0]["name"], "b");
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
}

#[test]
fn a_store_of_a_newer_format_is_left_alone() {
    let coppice = Coppice::new().unwrap();
    coppice.text(&["stats"]).unwrap();
    coppice.text(&["serve", "--stop"]).unwrap();
    let format = coppice.store().join("FORMAT");
    let text = std::fs::read_to_string(&format).unwrap();
    std::fs::write(&format, text.replace('1', "999")).unwrap();
    let line = coppice.refusal(&["stats"]).unwrap();
    assert!(line.contains("999") && line.contains("newer"), "{line}");
}

/// A file system of a few megabytes, gone when dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    /// `None` where this user may not mount.
    fn mount(at: std::path::PathBuf, size: &str) -> Option<Self> {
        std::fs::create_dir_all(&at).unwrap();
        let options = format!("size={size}");
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "small"]).arg(&at);
        mount.output().is_ok_and(|done| done.status.success()).then_some(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(std::process::Command::new("umount").arg("--lazy").arg(&self.0).output());
    }
}

#[test]
fn a_full_disk_is_one_clear_line_and_loses_nothing() {
    let coppice = Coppice::new().unwrap();
    let Some(_disk) = SmallDisk::mount(coppice.store(), "24m") else {
        eprintln!("skipped: only root may mount a small file system");
        return;
    };
    let small = coppice.scratch("small");
    std::fs::write(&small, noise(1 << 20, 7)).unwrap();
    coppice.text(&["import", small.to_str().unwrap(), "--name", "kept"]).unwrap();
    let large = coppice.scratch("large");
    std::fs::write(&large, noise(40 << 20, 8)).unwrap();

    let line = coppice.refusal(&["import", large.to_str().unwrap(), "--name", "lost"]).unwrap();
    assert!(line.to_lowercase().contains("space"), "{line}");
    let listed = coppice.json(&["snapshots"]).unwrap();
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 1);
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
    let out = coppice.scratch("out");
    coppice.text(&["export", "kept", out.to_str().unwrap()]).unwrap();
    assert!(same_bytes(&small, &out));
    coppice.text(&["serve", "--stop"]).unwrap();
}

/// Fills what is left, to the last block.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    for len in [1 << 20, 4096] {
        while file.write_all(&vec![1; len]).is_ok() {}
    }
}

#[test]
fn a_disk_without_a_free_block_is_cleared() {
    let coppice = Coppice::new().unwrap();
    let Some(disk) = SmallDisk::mount(coppice.store(), "64m") else {
        eprintln!("skipped: only root may mount a small file system");
        return;
    };
    let (kept, gone) = (coppice.scratch("kept"), coppice.scratch("gone"));
    std::fs::write(&kept, noise(3 << 20, 1)).unwrap();
    std::fs::write(&gone, noise(20 << 20, 2)).unwrap();
    for (file, name) in [(&kept, "kept"), (&gone, "gone")] {
        coppice.text(&["import", file.to_str().unwrap(), "--name", name]).unwrap();
    }
    for stops in [false, true] {
        fill(&disk.0.join("ballast"));
        let line = coppice.refusal(&["import", kept.to_str().unwrap(), "--name", "more"]).unwrap();
        assert!(line.to_lowercase().contains("space"), "{line}");
        if stops {
            coppice.text(&["serve", "--stop"]).unwrap();
        }
        coppice.text(&["rmi", "gone"]).unwrap();
        let done = coppice.json(&["gc"]).unwrap();
        assert!(done["freed_bytes"].as_u64().unwrap() > 19 << 20, "{done}");
        assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
        std::fs::remove_file(disk.0.join("ballast")).unwrap();
        coppice.text(&["import", gone.to_str().unwrap(), "--name", "gone"]).unwrap();
        assert!(disk.0.join("reserve").exists(), "room is set aside again");
    }
    let out = coppice.scratch("out");
    coppice.text(&["export", "kept", out.to_str().unwrap()]).unwrap();
    assert!(same_bytes(&kept, &out));
    coppice.text(&["serve", "--stop"]).unwrap();
}

#[test]
fn an_export_that_does_not_fit_leaves_no_file_and_replaces_none() {
    let coppice = Coppice::new().unwrap();
    let file = coppice.scratch("file");
    std::fs::write(&file, noise(8 << 20, 3)).unwrap();
    coppice.text(&["import", file.to_str().unwrap(), "--name", "it"]).unwrap();
    let line = coppice.refusal(&["export", "it", file.to_str().unwrap()]).unwrap();
    assert!(line.contains("exists"), "{line}");
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 8 << 20);
    let line = coppice.refusal(&["export", "it", "/dev/null"]).unwrap();
    assert!(line.contains("exists"), "{line}");
    let Some(small) = SmallDisk::mount(coppice.scratch("small"), "4m") else {
        eprintln!("skipped: only root may mount a small file system");
        return;
    };
    let out = small.0.join("out");
    let line = coppice.refusal(&["export", "it", out.to_str().unwrap()]).unwrap();
    assert!(line.to_lowercase().contains("space"), "{line}");
    assert!(!out.exists(), "an export that is not whole leaves no file");
}

#[test]
fn a_stream_is_bytes_and_no_disk() {
    let coppice = Coppice::new().unwrap();
    let file = coppice.scratch("file");
    std::fs::write(&file, noise(12_345, 6)).unwrap();
    coppice.text(&["import", file.to_str().unwrap(), "--name", "file", "--as", "stream"]).unwrap();
    let shown = coppice.json(&["show", "file"]).unwrap();
    assert_eq!(shown["snapshot"]["kind"], "stream");
    let out = coppice.scratch("out");
    coppice.text(&["export", "file", out.to_str().unwrap()]).unwrap();
    assert!(same_bytes(&file, &out));
}
