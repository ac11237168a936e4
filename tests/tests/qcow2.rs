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
    let base = base.to_str().unwrap();
    for (backing, problem) in
        [(&[over][..], "given twice"), (&[base, raw.to_str().unwrap()], "leave it out")]
    {
        let mut arguments = vec!["import", over, "--name", "x"];
        backing.iter().for_each(|path| arguments.extend(["--backing", path]));
        let line = coppice.refusal(&arguments).unwrap();
        assert!(line.contains(problem), "{line}");
    }
    let raw = raw.to_str().unwrap();
    let line = coppice.refusal(&["import", raw, "--name", "x", "--backing", base]).unwrap();
    assert!(line.contains("leave it out"), "{line}");
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

/// Writes into an image as a machine would.
fn qemu_io(image: &Path, format: &str, commands: &[String]) {
    let mut call = Command::new("qemu-io");
    call.args(["-f", format]);
    for command in commands {
        call.args(["-c", command]);
    }
    let output = call.arg(image).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Clusters of all sizes over each other, with bytes, zeros and nothing in
/// each, at odd places; every file is longer or shorter than the one below.
#[test]
fn a_chain_gives_the_disk_that_qemu_reads() {
    let coppice = Coppice::new().unwrap();
    let lowest = raw_disk(&coppice);
    let mut chain = vec![lowest];
    let layers =
        [("2M", "290M", "2"), ("64k", "310M", "3"), ("512", "305M", "4"), ("4k", "320M", "5")];
    for (number, (cluster, len, pattern)) in layers.into_iter().enumerate() {
        let over = coppice.scratch(&format!("layer-{number}"));
        let below = chain.last().unwrap();
        let format = if number == 0 { "raw" } else { "qcow2" };
        let options = format!("cluster_size={cluster}");
        let below = below.to_str().unwrap();
        let target = over.to_str().unwrap();
        if !qemu_img(&[
            "create", "-f", "qcow2", "-o", &options, "-F", format, "-b", below, target, len,
        ]) {
            return;
        }
        let step = u64::try_from(number).unwrap() * 7_000_000;
        let at = |mib: u64| step + (mib << 20);
        qemu_io(
            &over,
            "qcow2",
            &[
                format!("write -P {pattern} {} 3M", at(1)),
                format!("write -P {pattern} {} 1536", at(60) + 512 * 3),
                format!("write -z {} 2M", at(40) + 512),
                format!("write -z {} 700k", at(2)),
                format!("write -P {pattern} {} 512", at(290) - step - 512),
            ],
        );
        chain.push(over.clone());
        let flat = coppice.scratch("flat");
        qemu_img(&["convert", "-O", "raw", target, flat.to_str().unwrap()]);
        let name = format!("flat-{number}");
        let flat = coppice.json(&["import", flat.to_str().unwrap(), "--name", &name]).unwrap();
        let name = format!("chain-{number}");
        let mut arguments = vec!["import", target, "--name", &name];
        for path in chain.iter().rev().skip(1) {
            arguments.extend(["--backing", path.to_str().unwrap()]);
        }
        let merged = coppice.json(&arguments).unwrap();
        assert_eq!(merged["root"], flat["root"], "{name}");
        assert_eq!(merged["logical_bytes"], flat["logical_bytes"], "{name}");
    }
}
