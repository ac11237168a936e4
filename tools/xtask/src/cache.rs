//! Things that are made once: `<cache>/guest/<kind>-<hash of the inputs>/`.
//!
//! Invariant: a folder of that name is complete. It is made beside its place
//! under a lock, synchronised, and renamed into place.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// Hexadecimal digits of the hash that name a folder.
const KEY_DIGITS: usize = 24;

/// The folder of all that we keep: `$COPPICE_CACHE`, else in the user's cache.
pub(crate) fn folder() -> Result<PathBuf> {
    let folder = if let Some(folder) = set("COPPICE_CACHE") {
        folder
    } else if let Some(folder) = set("XDG_CACHE_HOME") {
        folder.join("coppice")
    } else if let Some(home) = set("HOME") {
        home.join(".cache/coppice")
    } else {
        bail!("there is no HOME: set COPPICE_CACHE to a folder for what is built");
    };
    create(&folder)?;
    folder.canonicalize().with_context(|| format!("cannot resolve {}", folder.display()))
}

fn set(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Creates a folder and those above it.
pub(crate) fn create(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}

/// The hash of labelled inputs.
#[derive(Debug, Default)]
pub(crate) struct Key {
    hasher: Sha256,
}

impl Key {
    /// Adds bytes under a name.
    pub(crate) fn bytes(mut self, label: &str, bytes: &[u8]) -> Self {
        self.label(label, u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        self.hasher.update(bytes);
        self
    }

    /// Adds the content of a file under a name.
    pub(crate) fn file(mut self, label: &str, path: &Path) -> Result<Self> {
        let reading = || format!("cannot read {}", path.display());
        let mut file = File::open(path).with_context(reading)?;
        self.label(label, file.metadata().with_context(reading)?.len());
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(self),
                Ok(len) => self.hasher.update(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).with_context(reading),
            }
        }
    }

    fn label(&mut self, label: &str, len: u64) {
        self.hasher.update(label.as_bytes());
        self.hasher.update([0]);
        self.hasher.update(len.to_le_bytes());
    }

    /// The name of what these inputs make.
    pub(crate) fn finish(self) -> String {
        let digest = self.hasher.finalize();
        let mut digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        digits.truncate(KEY_DIGITS);
        digits
    }
}

/// Returns the folder of `kind` and `key` in `parent`, after letting `build`
/// fill it if it is not there. Another process that wants the same one waits.
pub(crate) fn once(
    parent: &Path,
    kind: &str,
    key: Key,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let name = format!("{kind}-{}", key.finish());
    let place = parent.join(&name);
    if place.is_dir() {
        return Ok(place);
    }
    create(parent)?;
    let _lock = lock(&parent.join(format!("{name}.lock")), kind)?;
    if place.is_dir() {
        return Ok(place);
    }
    let partial = parent.join(format!("{name}.partial"));
    remove(&partial)?;
    sweep(parent, kind)?;
    create(&partial)?;
    if let Err(error) = build(&partial) {
        remove(&partial)?;
        return Err(error);
    }
    synchronise(&partial)?;
    std::fs::rename(&partial, &place)
        .with_context(|| format!("cannot rename {} into place", partial.display()))?;
    Ok(place)
}

fn lock(path: &Path, kind: &str) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("xtask: waiting for another process that makes the same {kind}");
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(file)
}

/// Removes what an interrupted build left behind.
fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).with_context(|| {
            format!("cannot remove {}, which an interrupted build left", folder.display())
        }),
        _ => Ok(()),
    }
}

/// Removes what interrupted builds of older inputs left: a partial folder
/// whose lock nobody holds.
fn sweep(parent: &Path, kind: &str) -> Result<()> {
    for entry in std::fs::read_dir(parent)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(name) = name.strip_suffix(".partial") else { continue };
        if !name.starts_with(&format!("{kind}-")) {
            continue;
        }
        let lock = File::create(parent.join(format!("{name}.lock")))?;
        if lock.try_lock().is_ok() {
            remove(&path)?;
        }
    }
    Ok(())
}

fn synchronise(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_file() {
            File::open(&path)?.sync_all().with_context(|| format!("syncing {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("xtask-{name}-{}", std::process::id()));
        remove(&folder).unwrap();
        folder
    }

    #[test]
    fn inputs_do_not_run_together() {
        let split = Key::default().bytes("a", b"xy").bytes("b", b"z").finish();
        let moved = Key::default().bytes("a", b"x").bytes("b", b"yz").finish();
        assert_ne!(split, moved);
        assert_eq!(split.len(), KEY_DIGITS);
    }

    #[test]
    fn a_file_counts_by_its_content() {
        let folder = scratch("key");
        create(&folder).unwrap();
        std::fs::write(folder.join("f"), b"content").unwrap();
        let by_file = Key::default().file("f", &folder.join("f")).unwrap().finish();
        assert_eq!(by_file, Key::default().bytes("f", b"content").finish());
        remove(&folder).unwrap();
    }

    #[test]
    fn a_thing_is_made_once_and_a_failure_leaves_nothing() {
        let folder = scratch("once");
        let key = || Key::default().bytes("a", b"x");
        create(&folder.join("thing-old.partial")).unwrap();
        let failed = once(&folder, "thing", key(), |partial| {
            std::fs::write(partial.join("half"), b"")?;
            bail!("no")
        });
        assert!(failed.is_err());
        assert!(!folder.join("thing-old.partial").exists());
        let made = once(&folder, "thing", key(), |partial| {
            assert!(!partial.join("half").exists());
            Ok(std::fs::write(partial.join("whole"), b"")?)
        })
        .unwrap();
        assert!(made.join("whole").is_file());
        let again = once(&folder, "thing", key(), |_| bail!("built twice")).unwrap();
        assert_eq!(again, made);
        remove(&folder).unwrap();
    }
}
