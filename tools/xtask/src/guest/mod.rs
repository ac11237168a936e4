//! The guest: a kernel, and a root disk that holds a small Debian, Python and
//! our agent. Each part is cached by the content of what it is made from:
//!
//! ```text
//! source package, config, patch, recipe, compiler -> kernel
//! package list, recipe -> rootfs ; rootfs, agent, recipe -> disk
//! ```

mod agent;
mod disk;
mod kernel;

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::Serialize;

pub(crate) use self::kernel::Flavour;
use crate::cache;
use crate::checkout::Checkout;

/// What a machine boots from.
#[derive(Debug, Serialize)]
pub(crate) struct Guest {
    /// An ELF kernel.
    pub(crate) kernel: PathBuf,
    /// A raw ext4 file system.
    pub(crate) disk: PathBuf,
    /// Which kernel it is.
    pub(crate) flavour: Flavour,
}

/// Makes what is not made yet.
pub(crate) fn make(checkout: &Checkout, flavour: Option<Flavour>) -> Result<Guest> {
    let flavour = flavour.map_or_else(Flavour::of_this_host, Ok)?;
    let cache = cache::folder()?.join("guest");
    let kernel = kernel::make(checkout, &cache, flavour)?;
    let agent = agent::build(checkout)?;
    let rootfs = disk::make_rootfs(checkout, &cache)?;
    let disk = disk::make(checkout, &cache, &rootfs, &agent)?;
    Ok(Guest { kernel, disk, flavour })
}

/// The archive of the root disk's files, without the agent.
pub(crate) fn rootfs(checkout: &Checkout) -> Result<PathBuf> {
    disk::make_rootfs(checkout, &cache::folder()?.join("guest"))
}

/// Makes the root disk again from nothing and compares it with the cached one.
pub(crate) fn verify(checkout: &Checkout) -> Result<()> {
    let cache = cache::folder()?.join("guest");
    let agent = agent::build(checkout)?;
    let first = disk::make(checkout, &cache, &disk::make_rootfs(checkout, &cache)?, &agent)?;
    let again = cache.join(format!("verify-{}", std::process::id()));
    let second = disk::make(checkout, &again, &disk::make_rootfs(checkout, &again)?, &agent)?;
    let hash = |path| Ok::<_, anyhow::Error>(cache::Key::default().file("disk", path)?.finish());
    if hash(&first)? != hash(&second)? {
        bail!(
            "two builds differ: {} and {}; if the lists `manifest` of their packages differ too, \
             Debian has newer packages than when the first was made",
            first.display(),
            second.display()
        );
    }
    std::fs::remove_dir_all(&again)?;
    eprintln!("xtask: both builds of the root disk have the same bytes");
    Ok(())
}
