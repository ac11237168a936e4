//! The guest's kernel, built from Debian's kernel source package.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Serialize;

use crate::cache::{self, Key};
use crate::checkout::Checkout;
use crate::process::{first_line, run_logged};

const SOURCE: &str = "/usr/src/linux-source-6.1.tar.xz";

/// Variables of the user's that would change what the kernel's makefiles do.
const FOREIGN: [&str; 9] = [
    "ARCH",
    "CROSS_COMPILE",
    "INSTALL_PATH",
    "KBUILD_OUTPUT",
    "KCFLAGS",
    "KCONFIG_CONFIG",
    "LLVM",
    "MAKEFLAGS",
    "MFLAGS",
];

/// Which kernel, by the kind of KVM that is to run it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Flavour {
    /// For a KVM that emulates the guest's ring 0 in software: patched to do
    /// without what the emulator lacks.
    SoftwareKvm,
    /// For a KVM that runs all of the guest on the CPU: unpatched.
    HardwareKvm,
}

impl Flavour {
    /// The kernel that suits this host. Hardware KVM needs one of two CPU
    /// features; a host that has neither and yet has KVM emulates.
    pub(crate) fn of_this_host() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
        Ok(Self::of_cpu(&text))
    }

    fn of_cpu(cpuinfo: &str) -> Self {
        let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        if flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
            Self::HardwareKvm
        } else {
            Self::SoftwareKvm
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::SoftwareKvm => "software-kvm",
            Self::HardwareKvm => "hardware-kvm",
        }
    }
}

/// The kernel's ELF file.
pub(super) fn make(checkout: &Checkout, cache: &Path, flavour: Flavour) -> Result<PathBuf> {
    let source = Path::new(SOURCE);
    if !source.is_file() {
        bail!("{SOURCE} is missing: run `cargo xtask setup`");
    }
    let recipe = checkout.path("tools/guest/kernel");
    let key = key(&recipe, source, flavour)?;
    let kind = format!("kernel-{}", flavour.name());
    let folder = cache::once(cache, &kind, key, |partial| {
        let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let mut command = Command::new(recipe.join("build.sh"));
        command.arg(source).arg(flavour.name()).arg(jobs.to_string()).current_dir(partial);
        for name in FOREIGN {
            command.env_remove(name);
        }
        let log = cache.join(format!("{kind}.log"));
        run_logged(&format!("building the guest's kernel ({})", flavour.name()), command, &log)
    })?;
    Ok(folder.join("vmlinux"))
}

fn key(recipe: &Path, source: &Path, flavour: Flavour) -> Result<Key> {
    let compiler = first_line(Command::new("gcc").arg("--version"))?;
    let mut key = Key::default()
        .file("source", source)?
        .bytes("compiler", compiler.as_bytes())
        .file("recipe", &recipe.join("build.sh"))?;
    for part in ["config", "required", "patch"] {
        let path = recipe.join(format!("{}.{part}", flavour.name()));
        if path.exists() || part != "patch" {
            key = key.file(part, &path)?;
        }
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_tells_the_flavour() {
        assert_eq!(Flavour::of_cpu("flags\t\t: fpu vmx sse\n"), Flavour::HardwareKvm);
        assert_eq!(Flavour::of_cpu("flags\t\t: fpu svm\n"), Flavour::HardwareKvm);
        assert_eq!(Flavour::of_cpu("flags\t\t: fpu svm_lock\n"), Flavour::SoftwareKvm);
    }
}
