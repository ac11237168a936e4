//! The files on which programs are compared: root disks of one Debian with
//! other packages and before and after upgrades, and the disk and memory of a
//! machine in successive states. Made once, like the guest.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::checkout::Checkout;
use crate::guest;
use crate::process::run_logged;

/// Guest memory of the machine, in MiB.
const MEMORY_MIB: &str = "192";

/// Files in the order in which they are ingested.
#[derive(Debug)]
pub(super) struct Corpus {
    pub(super) files: Vec<PathBuf>,
    pub(super) logical_bytes: u64,
    pub(super) data_bytes: u64,
}

impl Corpus {
    /// Every file in a folder and the folders in it, by name.
    pub(super) fn of(folder: &Path) -> Result<Self> {
        let mut files = Vec::new();
        collect(folder, &mut files)?;
        files.sort();
        let mut corpus = Self { files, logical_bytes: 0, data_bytes: 0 };
        for file in &corpus.files {
            let metadata = std::fs::metadata(file)?;
            corpus.logical_bytes += metadata.len();
            corpus.data_bytes += metadata.blocks() * 512;
        }
        Ok(corpus)
    }
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "raw") {
            files.push(path);
        }
    }
    Ok(())
}

/// Makes the corpus if there is none of these recipes yet.
pub(super) fn make(checkout: &Checkout) -> Result<Corpus> {
    let binary = crate::story::build_binary(checkout)?;
    let made = guest::make(checkout, None)?;
    let rootfs = guest::rootfs(checkout)?;
    let recipes = checkout.root().join("tools/peers");
    let key = Key::default()
        .file("disks", &recipes.join("disks.sh"))?
        .file("machine", &recipes.join("machine.sh"))?
        .bytes("rootfs", rootfs.as_os_str().as_encoded_bytes())
        .bytes("disk", made.disk.as_os_str().as_encoded_bytes())
        .finish();
    let folder = cache::folder()?.join("corpus");
    let place = folder.join(&key);
    if !place.exists() {
        let part = folder.join(format!("{key}.part"));
        if part.exists() {
            std::fs::remove_dir_all(&part)?;
        }
        let (disks, machine) = (part.join("disks"), part.join("machine"));
        cache::create(&disks)?;
        cache::create(&machine)?;
        let mut command = Command::new(recipes.join("disks.sh"));
        command.arg(&rootfs).current_dir(&disks);
        run_logged("making root disks to compare on", command, &folder.join("disks.log"))?;
        let mut command = Command::new(recipes.join("machine.sh"));
        command.args([&binary, &made.kernel, &made.disk]).arg(MEMORY_MIB).current_dir(&machine);
        run_logged("capturing a machine to compare on", command, &folder.join("machine.log"))?;
        std::fs::rename(&part, &place)?;
    }
    Corpus::of(&place)
}

/// Whether two files have the same bytes.
pub(super) fn same(one: &Path, other: &Path) -> Result<bool> {
    let open = |path: &Path| File::open(path).with_context(|| format!("no {}", path.display()));
    let (mut left, mut right) = (open(one)?, open(other)?);
    let mut buffers = [vec![0; 1 << 20], vec![0; 1 << 20]];
    loop {
        let count = left.read(&mut buffers[0])?;
        if count == 0 {
            return Ok(right.read(&mut buffers[1])? == 0);
        }
        if right.read_exact(&mut buffers[1][..count]).is_err() {
            return Ok(false);
        }
        if buffers[0][..count] != buffers[1][..count] {
            return Ok(false);
        }
    }
}

/// Takes a file out of the page cache, where it would displace what the next
/// step should find there.
pub(super) fn forget(file: &Path) {
    let mut input = std::ffi::OsString::from("if=");
    input.push(file);
    let mut command = Command::new("dd");
    command.arg(input).args(["iflag=nocache", "count=0", "status=none"]);
    drop(command.status());
}
