//! What the host must have: Debian packages, and KVM.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::process::{is_root, run_logged};

/// For the guest's kernel, for RocksDB and its bindings, for the root disk,
/// for the independent reader of the format.
const PACKAGES: [&str; 22] = [
    "linux-source-6.1",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "libssl-dev",
    "xz-utils",
    "make",
    "patch",
    "gcc",
    "g++",
    "libc6-dev",
    "clang",
    "libclang-dev",
    "debootstrap",
    "e2fsprogs",
    "cpio",
    "pkg-config",
    "git",
    "python3",
    "qemu-utils",
    "python3-pip",
];

/// Installs the packages that are missing, or says how to.
pub(crate) fn run() -> Result<()> {
    check_kvm()?;
    install(&PACKAGES)
}

/// Installs those of these packages that are missing, or says how to.
pub(crate) fn install(packages: &[&'static str]) -> Result<()> {
    let missing = missing(packages, &installed()?);
    if missing.is_empty() {
        eprintln!("xtask: all packages are installed");
        return Ok(());
    }
    if !is_root() {
        bail!(
            "packages are missing; run:\n  sudo apt-get update && sudo apt-get install -y \
             --no-install-recommends {}",
            missing.join(" ")
        );
    }
    let logs = cache::folder()?.join("logs");
    cache::create(&logs)?;
    let mut update = apt_get();
    update.arg("update");
    run_logged("updating the package lists", update, &logs.join("apt-update.log"))?;
    let mut install = apt_get();
    install.args(["install", "-y", "--no-install-recommends"]).args(&missing);
    let what = format!("installing {}", missing.join(" "));
    run_logged(&what, install, &logs.join("apt-install.log"))
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=300"]);
    command
}

/// The names of the packages that dpkg knows as installed.
fn installed() -> Result<BTreeSet<String>> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .stdin(Stdio::null())
        .output()
        .context("cannot start dpkg-query: cargo xtask sets up Debian and its kin only")?;
    Ok(parse_installed(&String::from_utf8_lossy(&output.stdout)))
}

fn parse_installed(listing: &str) -> BTreeSet<String> {
    listing.lines().filter_map(|line| line.strip_suffix(" installed")).map(str::to_owned).collect()
}

fn missing(packages: &[&'static str], installed: &BTreeSet<String>) -> Vec<&'static str> {
    packages.iter().copied().filter(|package| !installed.contains(*package)).collect()
}

/// Says before anything long begins that machines cannot run here.
fn check_kvm() -> Result<()> {
    let device = Path::new("/dev/kvm");
    let Err(error) = File::options().read(true).write(true).open(device) else {
        return Ok(());
    };
    match error.kind() {
        ErrorKind::PermissionDenied => bail!(
            "/dev/kvm is not open to this user: run `sudo usermod -aG kvm $USER` and log in again"
        ),
        ErrorKind::NotFound => bail!(
            "/dev/kvm is missing, and machines need it: turn on virtualisation in the firmware \
             (or nested virtualisation on the host of this machine), then \
             `modprobe kvm_intel` or `modprobe kvm_amd`"
        ),
        _ => Err(error).context("cannot open /dev/kvm"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_package_is_missing() {
        let listing = "flex installed\nbison config-files\nmake installed\n";
        let missing = missing(&PACKAGES, &parse_installed(listing));
        assert!(missing.contains(&"bison"));
        assert!(!missing.contains(&"flex"));
        assert_eq!(missing.len(), PACKAGES.len() - 2);
    }
}
