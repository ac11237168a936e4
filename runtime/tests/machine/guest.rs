//! The guest of these tests: the kernel that the environment names, and a
//! root disk with one static program.

use std::fs::File;
use std::path::Path;
use std::process::Command;

pub(crate) const CMDLINE: &str = "console=ttyS0 panic=-1 reboot=k root=/dev/vda rw init=/init";

pub(crate) struct Guest {
    pub(crate) kernel: File,
    pub(crate) root: File,
}

/// `None`, with the reason printed, where machines cannot run. In CI, that is
/// a failure.
pub(crate) fn guest() -> Option<Guest> {
    if !has_kvm() {
        return None;
    }
    let Some(kernel) = std::env::var_os("COPPICE_GUEST_KERNEL") else {
        println!("skipped: COPPICE_GUEST_KERNEL names no guest kernel");
        return None;
    };
    let kernel = File::open(kernel).expect("the guest kernel can be opened");
    Some(Guest { kernel, root: root_disk() })
}

/// Whether there is KVM; prints the reason if not, and fails in CI.
pub(crate) fn has_kvm() -> bool {
    if Path::new("/dev/kvm").exists() {
        return true;
    }
    println!("skipped: no /dev/kvm");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must have /dev/kvm");
    false
}

fn root_disk() -> File {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    std::fs::create_dir_all(root.join("dev")).unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/init.c");
    run(Command::new("gcc").args(["-static", "-O1", "-o"]).arg(root.join("init")).arg(source));
    let pattern: Vec<u8> =
        (0..2u32 << 20).map(|at| (at.wrapping_mul(at) >> 7).to_le_bytes()[0]).collect();
    std::fs::write(root.join("pattern"), &pattern).unwrap();
    let image = folder.path().join("root.img");
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&image).arg("24M"));
    crate::harness::memfd(&std::fs::read(image).unwrap())
}

/// The checksum that the guest's `sum` computes of the file `pattern`.
pub(crate) fn pattern_sum() -> String {
    let sum = (0..2u32 << 20)
        .map(|at| (at.wrapping_mul(at) >> 7).to_le_bytes()[0])
        .fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
    sum.to_string()
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}
