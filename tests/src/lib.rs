//! What the tests of the whole share: running the binary in a store of its
//! own, and finding the guest that `cargo xtask test` built.

pub mod naive_tree;
pub mod pack_keys;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

/// A store in a temporary folder, and the binary that serves it. Dropping it
/// ends its supervisor and with it every machine.
#[derive(Debug)]
pub struct Coppice {
    binary: PathBuf,
    folder: TempDir,
}

impl Coppice {
    /// A new, empty store.
    pub fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("coppice-test-").tempdir()?;
        Ok(Self { binary: binary()?, folder })
    }

    /// The folder of the store.
    pub fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// A place for a test's own files.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The binary with this store, ready for arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--store").arg(self.store()).stdin(Stdio::null());
        command
    }

    /// Runs a command and returns what became of it.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Output> {
        Ok(self.command().args(arguments).output()?)
    }

    /// Runs a command that must succeed and returns what it printed.
    pub fn text<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<String> {
        let output = self.run(arguments)?;
        if !output.status.success() {
            bail!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs a command that must succeed with `--json`.
    pub fn json<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Value> {
        let mut all = vec![OsStr::new("--json")];
        all.extend(arguments.iter().map(AsRef::as_ref));
        let text = self.text(&all)?;
        serde_json::from_str(&text).with_context(|| format!("not one JSON document: {text}"))
    }

    /// Imports the guest's disk as `root` and boots a machine from it.
    pub fn boot(&self, guest: &Guest, name: &str, memory_mib: u32) -> Result<()> {
        let (disk, kernel) = (guest.disk.to_str(), guest.kernel.to_str());
        let (disk, kernel) = disk.zip(kernel).context("the guest lies at an odd place")?;
        self.text(&["import", disk, "--name", "root"])?;
        let memory = memory_mib.to_string();
        let run =
            ["run", "--name", name, "--kernel", kernel, "--disk", "root", "--memory", &memory];
        self.text(&run).map(drop)
    }

    /// Runs a command that must fail with exit code 1 and one line, and
    /// returns that line.
    pub fn refusal<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<String> {
        let output = self.run(arguments)?;
        let errors = String::from_utf8(output.stderr)?;
        if output.status.code() != Some(1) {
            bail!("expected a failure, got {}: {errors}", output.status);
        }
        let mut lines = errors.lines().filter(|line| !line.is_empty());
        match (lines.next(), lines.next()) {
            (Some(line), None) => Ok(line.to_owned()),
            _ => bail!("expected one line, got: {errors}"),
        }
    }

    /// The process id of the supervisor, started if need be.
    pub fn supervisor(&self) -> Result<u32> {
        self.text(&["stats"])?;
        let lock = self.store();
        for entry in std::fs::read_dir("/proc")? {
            let path = entry?.path();
            let Ok(line) = std::fs::read(path.join("cmdline")) else { continue };
            let text = String::from_utf8_lossy(&line).replace('\0', " ");
            if text.contains("serve") && text.contains(&lock.display().to_string()) {
                let pid = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
                return Ok(pid.parse()?);
            }
        }
        bail!("no supervisor serves {}", lock.display())
    }
}

impl Drop for Coppice {
    fn drop(&mut self) {
        // The folder goes next; a supervisor that is already gone is fine.
        drop(self.run(&["serve", "--stop"]));
    }
}

/// The binary under test: the one that was built with these tests, unless
/// `COPPICE_BIN` names another.
fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("COPPICE_BIN") {
        return Ok(PathBuf::from(path));
    }
    let test = std::env::current_exe()?;
    let path = test.parent().and_then(Path::parent).context("no build folder")?.join("coppice");
    if !path.exists() {
        bail!("{} is not there: build it with `cargo build --release -p coppice`", path.display());
    }
    Ok(path)
}

/// The kernel and the root disk that tests boot.
#[derive(Debug, Clone)]
pub struct Guest {
    /// A Linux kernel.
    pub kernel: PathBuf,
    /// A raw root disk with Python 3 and the agent.
    pub disk: PathBuf,
}

/// The guest, or `None` after saying why a test that needs it is skipped.
/// Under `CI=true` a missing guest or `/dev/kvm` is a failure.
pub fn guest() -> Option<Guest> {
    let kernel = std::env::var_os("COPPICE_GUEST_KERNEL").map(PathBuf::from);
    let disk = std::env::var_os("COPPICE_GUEST_DISK").map(PathBuf::from);
    let reason = match (Path::new("/dev/kvm").exists(), kernel, disk) {
        (true, Some(kernel), Some(disk)) => return Some(Guest { kernel, disk }),
        (false, _, _) => "no /dev/kvm",
        (true, _, _) => "no guest: `cargo xtask test` builds one",
    };
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI must not skip: {reason}");
    eprintln!("skipped: {reason}");
    None
}
