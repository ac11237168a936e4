//! Namespaces in which there is nothing: no files, no network, no other
//! host's objects. Made once by the process from which all machines are
//! forked, so that they cost a machine neither time nor memory.

use std::io;
use std::path::Path;

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{chdir, getegid, geteuid, pivot_root};
use rustix::thread::UnshareFlags;

use super::{JailError, step};
use crate::sys::process::unshare;

/// A folder of every Linux system to mount the empty root over. Only the new
/// namespace sees that.
const PLACE: &str = "/tmp";

/// Leaves the host's files, network and other shared names behind. The
/// calling process must have one thread.
///
/// # Errors
/// If the kernel refuses: some containers forbid new namespaces.
pub fn empty_root() -> Result<(), JailError> {
    let spaces =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    if geteuid().is_root() {
        unshare(spaces).map_err(step("new namespaces"))?;
    } else {
        // Who is not root may do the rest only in a user namespace of its own.
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        unshare(spaces | UnshareFlags::NEWUSER).map_err(step("new namespaces"))?;
        map_ids(uid, gid).map_err(step("map the user into its namespace"))?;
    }
    // Nothing that is mounted here shows outside.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(step("make mounts private"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("none", PLACE, "tmpfs", flags, c"size=4k,nr_inodes=1,mode=0555")
        .map_err(step("mount an empty root"))?;
    chdir(PLACE).map_err(step("enter the empty root"))?;
    // The old root lands on top of the new one, and is taken away.
    pivot_root(".", ".").map_err(step("pivot to the empty root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("unmount the old root"))?;
    chdir("/").map_err(step("enter the empty root"))?;
    mount_remount("/", flags | MountFlags::RDONLY, c"").map_err(step("make the root read-only"))
}

fn map_ids(uid: u32, gid: u32) -> io::Result<()> {
    let proc = Path::new("/proc/self");
    std::fs::write(proc.join("setgroups"), "deny")?;
    std::fs::write(proc.join("uid_map"), format!("{uid} {uid} 1"))?;
    std::fs::write(proc.join("gid_map"), format!("{gid} {gid} 1"))
}
