//! What the supervisor may ask, and what it is refused.

use std::os::fd::AsFd;

use super::super::Script;
use super::fork::{Host, can_fault};
use crate::protocol::{MachineKey, PagerReply, PagerRequest, PoolId, Region};
use crate::sys::userfault::Userfault;

#[test]
fn a_pool_closes_only_when_no_machine_uses_it() {
    if !can_fault() {
        return;
    }
    let host = Host::new(Script::plain(64 * 4096));
    let memory = host.open_pool(1);
    let fork = host.fork(9, 1, &memory);
    fork.read(0);
    host.pool_with(|stats| stats.resident_pages == 16);
    let close = PagerRequest::ClosePool { pool: PoolId(1) };
    assert!(host.call(&close, &[]).0.unwrap_err().contains("in use"));
    let (reply, _) = host.call(&PagerRequest::Detach { machine: MachineKey(9) }, &[]);
    let Ok(PagerReply::Machine(faults)) = reply else { panic!("{reply:?}") };
    assert_eq!((faults.faults, faults.store_faults, faults.pages_installed), (1, 1, 16));
    assert_eq!(host.call(&close, &[]).0, Ok(PagerReply::Done));
    assert_eq!(host.stats(), (vec![], vec![]));
    assert!(host.call(&close, &[]).0.unwrap_err().contains("there is no"));
}

#[test]
fn names_are_used_once_and_descriptors_are_counted() {
    if !can_fault() {
        return;
    }
    let host = Host::new(Script::plain(64 * 4096));
    let memory = host.open_pool(1);
    let again = PagerRequest::OpenPool { pool: PoolId(1) };
    assert!(host.call(&again, &[memory.as_fd()]).0.unwrap_err().contains("exists"));
    assert!(host.call(&again, &[]).0.unwrap_err().contains("descriptors"));
    let fork = host.fork(1, 1, &memory);
    let attach =
        PagerRequest::Attach { machine: MachineKey(1), regions: vec![(PoolId(1), fork.region())] };
    let userfault = Userfault::new().unwrap();
    assert!(host.call(&attach, &[userfault.as_fd()]).0.unwrap_err().contains("exists"));
}

#[test]
fn a_mapping_outside_its_pool_is_refused() {
    if !can_fault() {
        return;
    }
    let host = Host::new(Script::plain(64 * 4096));
    let memory = host.open_pool(1);
    let fork = host.fork(1, 1, &memory);
    let good = fork.region();
    let bad = [
        Region { offset: 4096, ..good },
        Region { len: good.len + 4096, ..good },
        Region { address: good.address + 1, ..good },
        Region { offset: u64::MAX - 4095, ..good },
        Region { address: u64::MAX - 4095, len: 8192, ..good },
    ];
    let userfault = Userfault::new().unwrap();
    for region in bad {
        let attach =
            PagerRequest::Attach { machine: MachineKey(2), regions: vec![(PoolId(1), region)] };
        host.call(&attach, &[userfault.as_fd()]).0.unwrap_err();
    }
}

#[test]
fn the_pool_that_machines_get_cannot_be_written() {
    if !can_fault() {
        return;
    }
    use std::io::Write;
    let host = Host::new(Script::plain(64 * 4096));
    let mut memory = std::fs::File::from(host.open_pool(1));
    let error = memory.write(b"x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
}
