//! Importing qcow2 disks, as `qemu-img` makes them and as nobody should.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use coppice_tests::Coppice;

fn noise(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// Runs `qemu-img`; false if there is none, which only CI must not accept.
fn qemu_img(arguments: &[&str]) -> bool {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "qemu-img {arguments:?}: {said}");
            true
        }
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "CI needs qemu-img: {error}");
            eprintln!("skipped: no qemu-img");
            false
        }
    }
}

/// A sparse raw disk with compressible, random and repeated parts and an odd end.
fn raw_disk(coppice: &Coppice) -> PathBuf {
    let path = coppice.scratch("raw");
    let file = File::create(&path).unwrap();
    file.set_len((300 << 20) + 512 * 5).unwrap();
    file.write_all_at(&noise(3 << 20, 1), 0).unwrap();
    file.write_all_at(&vec![0x41; 1 << 20], 40 << 20).unwrap();
    file.write_all_at(&noise(700, 2), (200 << 20) + 4096 * 3 + 17).unwrap();
    file.write_all_at(&noise(5000, 3), (300 << 20) - 2500).unwrap();
    path
}

fn imports_as(coppice: &Coppice, image: &Path, name: &str, root: &str) {
    let done = coppice.json(&["import", image.to_str().unwrap(), "--name", name]).unwrap();
    assert_eq!(done["root"], root, "{name}");
}

#[test]
fn every_shape_of_qcow2_gives_the_raw_disk() {
    let coppice = Coppice::new().unwrap();
    let raw = raw_disk(&coppice);
    let raw = raw.to_str().unwrap();
    let first = coppice.json(&["import", raw, "--name", "raw"]).unwrap();
    let root = first["root"].as_str().unwrap();
    let shapes: [(&str, &[&str]); 7] = [
        ("plain", &[]),
        ("deflate", &["-c"]),
        ("zstd", &["-c", "-o", "compression_type=zstd"]),
        ("old", &["-o", "compat=0.10"]),
        ("old-compressed", &["-c", "-o", "compat=0.10,cluster_size=4k"]),
        ("small-clusters", &["-o", "cluster_size=512"]),
        ("large-clusters", &["-c", "-o", "cluster_size=2M"]),
    ];
    for (name, options) in shapes {
        let image = coppice.scratch(name);
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2"];
        arguments.extend(options);
        arguments.extend([raw, image.to_str().unwrap()]);
        if !qemu_img(&arguments) {
            return;
        }
        imports_as(&coppice, &image, name, root);
    }
    // An internal snapshot keeps older clusters, which are not the disk's.
    let image = coppice.scratch("plain");
    let image = image.to_str().unwrap();
    qemu_img(&["snapshot", "-c", "before", image]);
    let file = coppice.scratch("plain");
    imports_as(&coppice, &file, "with-snapshot", root);
    // Taken byte for byte it is another disk.
    let line = coppice.json(&["import", image, "--name", "bytes", "--format", "raw"]).unwrap();
    assert_ne!(line["root"], root);
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let coppice = Coppice::new().unwrap();
    let raw = raw_disk(&coppice);
    let line =
        coppice.refusal(&["import", raw.to_str().unwrap(), "--name", "x", "--format", "qcow2"]);
    assert!(line.unwrap().contains("no sound qcow2 image"));
    let base = coppice.scratch("base");
    if !qemu_img(&["create", "-f", "qcow2", base.to_str().unwrap(), "10M"]) {
        return;
    }
    let over = coppice.scratch("over");
    let over = over.to_str().unwrap();
    qemu_img(&["create", "-f", "qcow2", "-F", "qcow2", "-b", base.to_str().unwrap(), over]);
    let line = coppice.refusal(&["import", over, "--name", "x"]).unwrap();
    assert!(line.contains("written over") && line.contains("base"), "{line}");
    let data = coppice.scratch("data");
    let external = coppice.scratch("external");
    let external = external.to_str().unwrap();
    let option = format!("data_file={}", data.display());
    qemu_img(&["create", "-f", "qcow2", "-o", &option, external, "10M"]);
    let line = coppice.refusal(&["import", external, "--name", "x"]).unwrap();
    assert!(line.contains("an external data file"), "{line}");
    let subclusters = coppice.scratch("subclusters");
    let subclusters = subclusters.to_str().unwrap();
    qemu_img(&["create", "-f", "qcow2", "-o", "extended_l2=on", subclusters, "10M"]);
    let line = coppice.refusal(&["import", subclusters, "--name", "x"]).unwrap();
    assert!(line.contains("subclusters"), "{line}");
}
