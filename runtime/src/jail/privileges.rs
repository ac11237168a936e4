//! Becoming nobody.

use rustix::process::{Gid, Resource, Rlimit, Uid, geteuid, getpid, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::{JailError, step};

/// The user id of a machine's process is this plus its process id: one that
/// no user, container or other machine has (process ids are below 2^22).
const FIRST_UID: u32 = 0x7000_0000;

/// Descriptors: the channel, two for each disk, one for each open stream to
/// the guest and a few for each device.
const DESCRIPTORS_MAX: u64 = 4096;
/// Threads: vCPUs and a few for each device.
const THREADS_MAX: u64 = 256;

/// Takes every capability out of the set of those that this process, or one
/// that it forks, could gain. What it has it keeps.
pub(super) fn forgo() {
    for capability in CapabilitySet::all().iter() {
        // A kernel that does not know one answers EINVAL; who may not change
        // the set (not root) has nothing in it that could be regained.
        let _unknown = remove_capability_from_bounding_set(capability);
    }
}

/// Gives up every privilege and bounds what can be used up.
pub(super) fn drop_all() -> Result<(), JailError> {
    bound()?;
    set_no_new_privs(true).map_err(step("forbid new privileges"))?;
    if geteuid().is_root() {
        become_nobody()?;
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(step("give up capabilities"))
}

fn become_nobody() -> Result<(), JailError> {
    let id = FIRST_UID + u32::try_from(getpid().as_raw_nonzero().get()).unwrap_or(0);
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    set_thread_groups(&[]).map_err(step("leave all groups"))?;
    set_thread_res_gid(group, group, group).map_err(step("change the group"))?;
    set_thread_res_uid(user, user, user).map_err(step("change the user"))
}

fn bound() -> Result<(), JailError> {
    let limits = [
        (Resource::Core, 0, "no core dumps"),
        (Resource::Memlock, 0, "no locked memory"),
        (Resource::Nofile, DESCRIPTORS_MAX, "limit descriptors"),
        (Resource::Nproc, THREADS_MAX, "limit threads"),
        (Resource::Msgqueue, 0, "no message queues"),
    ];
    for (resource, limit, what) in limits {
        let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
        setrlimit(resource, limit).map_err(step(what))?;
    }
    Ok(())
}
