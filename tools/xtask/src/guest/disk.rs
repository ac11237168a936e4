//! The guest's root disk: Debian's packages first, which take minutes, then
//! the agent on top of them, which takes seconds.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Result;

use crate::cache::{self, Key};
use crate::checkout::Checkout;
use crate::process::{as_root, run_logged};

const MIRROR: &str = "http://deb.debian.org/debian";

/// The archive of a small Debian.
pub(super) fn make_rootfs(checkout: &Checkout, cache: &Path) -> Result<PathBuf> {
    let recipe = checkout.path("tools/guest/rootfs");
    let key = Key::default()
        .file("packages", &recipe.join("packages"))?
        .file("recipe", &recipe.join("build.sh"))?;
    let folder = cache::once(cache, "rootfs", key, |partial| {
        let mut command = as_root(&recipe.join("build.sh"))?;
        command.arg(mirror()).current_dir(partial);
        run_logged("making the guest's Debian", command, &cache.join("rootfs.log"))
    })?;
    Ok(folder.join("rootfs.tar"))
}

/// The raw disk.
pub(super) fn make(
    checkout: &Checkout,
    cache: &Path,
    rootfs: &Path,
    agent: &Path,
) -> Result<PathBuf> {
    let recipe = checkout.path("tools/guest/rootfs/image.sh");
    let key =
        Key::default().file("rootfs", rootfs)?.file("agent", agent)?.file("recipe", &recipe)?;
    let folder = cache::once(cache, "disk", key, |partial| {
        let mut command = as_root(&recipe)?;
        command.arg(rootfs).arg(agent).current_dir(partial);
        run_logged("making the guest's root disk", command, &cache.join("disk.log"))
    })?;
    Ok(folder.join("disk.raw"))
}

/// The mirror that this machine uses for the same Debian, if it does; its
/// bytes are the same everywhere, so it is not part of a key.
fn mirror() -> String {
    if let Ok(mirror) = std::env::var("COPPICE_DEBIAN_MIRROR") {
        return mirror;
    }
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(CODENAME) $(ORIGIN) $(REPO_URI)"])
        .stdin(Stdio::null())
        .output();
    let listing = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    find_mirror(&listing.unwrap_or_default()).unwrap_or(MIRROR).to_owned()
}

fn find_mirror(listing: &str) -> Option<&str> {
    listing
        .lines()
        .filter_map(|line| line.strip_prefix("bookworm Debian "))
        .find(|uri| uri.starts_with("http"))
        .map(|uri| uri.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_one_of_the_same_debian() {
        let listing = "bookworm-security Debian http://s/\nbookworm Docker https://d/\n\
                       bookworm Debian http://mirror/debian/\n";
        assert_eq!(find_mirror(listing), Some("http://mirror/debian"));
        assert_eq!(find_mirror("trixie Debian http://mirror/debian/\n"), None);
    }
}
