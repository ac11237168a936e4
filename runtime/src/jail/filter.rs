//! Which system calls a machine's process may make.
//!
//! Two filters; the kernel takes the stricter answer of both. The first lets
//! a caller go on without what it asked for: `clone3`, whose flags a filter
//! cannot see, so that the C library falls back to `clone`; and opening files,
//! which a library may try for its own reasons. The second is the allow list:
//! any other call ends the process, which says which one it was.
//!
//! A third is installed when the machine is made. A page of a pool that is
//! missing must never be read through a mapping that the page server does not
//! serve: the kernel would make it a page of zeros, for all who share the pool.
//! So from then on no file is mapped, no mapping moves, and no userfaultfd is
//! spoken to. These calls fail, and an allocator does without.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{JailError, step};
use crate::sys::process::on_forbidden_call;

/// Calls whose arguments do not matter: they reach only what is open already.
const FREE: &[i64] = &[
    // Bytes in and out of the machine's own descriptors.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    // Its channel, and streams to the guest.
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    // Waiting for them.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    // Descriptors.
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    // Memory; what may be executed is decided below.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads, signals to oneself, time, chance.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Refused without ending the process, with `ENOSYS`.
const REFUSED: &[i64] = &[libc::SYS_clone3, libc::SYS_open, libc::SYS_openat, libc::SYS_readlink];

/// The types of the ioctls of KVM and of userfaultfd.
const KVM: u64 = 0xae00;
const USERFAULT: u64 = 0xaa00;
const IOCTL_TYPE: u64 = 0xff00;
/// What the kernel told the process when it began, Linux 6.4.
const PR_GET_AUXV: u64 = 0x4155_5856;
/// `PAGEMAP_SCAN`: which of its own pages the process has written.
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// Advice by which the kernel would make pages where a file has none.
const MAKING_PAGES: [i32; 2] = [libc::MADV_HUGEPAGE, libc::MADV_COLLAPSE];

/// Installs both filters, for this thread and those that it starts.
pub(super) fn install() -> Result<(), JailError> {
    on_forbidden_call().map_err(step("install the handler of forbidden calls"))?;
    let refusal = SeccompAction::Errno(u32::try_from(libc::ENOSYS).unwrap_or(0));
    let refused = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let own_process = rustix::process::getpid().as_raw_nonzero().get();
    let allowed = allowed(u64::try_from(own_process).unwrap_or(0))?;
    let filters = [
        compile(refused, SeccompAction::Allow, refusal)?,
        compile(allowed, SeccompAction::Trap, SeccompAction::Allow)?,
    ];
    filters.iter().try_for_each(|filter| seccompiler::apply_filter(filter)).map_err(named)
}

/// Installs the filter of a machine that is made, for all threads.
pub(super) fn settle() -> Result<(), JailError> {
    let anonymous = u64::try_from(libc::MAP_ANONYMOUS).unwrap_or(0);
    let advice = MAKING_PAGES.map(|advice| equal(2, u64::try_from(advice).unwrap_or(0)));
    let refused = BTreeMap::from([
        (libc::SYS_mmap, vec![masked(3, anonymous, 0)?]),
        (libc::SYS_mremap, Vec::new()),
        (libc::SYS_ioctl, vec![masked(1, IOCTL_TYPE, USERFAULT)?]),
        (libc::SYS_madvise, advice.into_iter().collect::<Result<_, _>>()?),
    ]);
    let refusal = SeccompAction::Errno(u32::try_from(libc::EPERM).unwrap_or(0));
    let filter = compile(refused, SeccompAction::Allow, refusal)?;
    seccompiler::apply_filter_all_threads(&filter).map_err(named)
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, JailError> {
    let filter = SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64);
    BpfProgram::try_from(filter.map_err(named)?).map_err(named)
}

fn allowed(own_process: u64) -> Result<BTreeMap<i64, Vec<SeccompRule>>, JailError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        FREE.iter().chain(REFUSED).map(|call| (*call, Vec::new())).collect();
    let exec = u64::try_from(libc::PROT_EXEC).unwrap_or(0);
    let thread = u64::try_from(libc::CLONE_THREAD | libc::CLONE_VM).unwrap_or(0);
    // No memory that can be executed, no process, no signal to others.
    rules.insert(libc::SYS_mmap, vec![masked(2, exec, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![masked(2, exec, 0)?]);
    rules.insert(libc::SYS_clone, vec![masked(0, thread, thread)?]);
    rules.insert(libc::SYS_tgkill, vec![equal(0, own_process)?]);
    // Names of threads, and where the vDSO with the clock lies.
    let name = u64::try_from(libc::PR_SET_NAME).unwrap_or(0);
    // The third filter can be added: it only takes away.
    let no_new = u64::try_from(libc::PR_SET_NO_NEW_PRIVS).unwrap_or(0);
    let prctls = vec![equal(0, name)?, equal(0, PR_GET_AUXV)?, equal(0, no_new)?];
    rules.insert(libc::SYS_prctl, prctls);
    let add = is(0, SeccompCmpOp::Eq, u64::from(libc::SECCOMP_SET_MODE_FILTER))?;
    let to_all = is(1, SeccompCmpOp::Eq, libc::SECCOMP_FILTER_FLAG_TSYNC)?;
    rules.insert(libc::SYS_seccomp, vec![all_of(vec![add, to_all])?]);
    let ioctls =
        [masked(1, IOCTL_TYPE, KVM)?, masked(1, IOCTL_TYPE, USERFAULT)?, equal(1, PAGEMAP_SCAN)?];
    rules.insert(libc::SYS_ioctl, ioctls.into());
    let commands = [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC];
    let commands: Result<Vec<_>, _> =
        commands.into_iter().map(|command| equal(1, u64::try_from(command).unwrap_or(0))).collect();
    let mut commands = commands?;
    commands.push(never_blocking()?);
    rules.insert(libc::SYS_fcntl, commands);
    Ok(rules)
}

/// A descriptor may be made to never block, and not to block again: the page
/// server reads the same userfaultfd, and must not sleep in it.
fn never_blocking() -> Result<SeccompRule, JailError> {
    let set = is(1, SeccompCmpOp::Eq, u64::try_from(libc::F_SETFL).unwrap_or(0))?;
    let flag = u64::try_from(libc::O_NONBLOCK).unwrap_or(0);
    all_of(vec![set, is(2, SeccompCmpOp::MaskedEq(flag), flag)?])
}

fn equal(argument: u8, value: u64) -> Result<SeccompRule, JailError> {
    rule(argument, SeccompCmpOp::Eq, value)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, JailError> {
    rule(argument, SeccompCmpOp::MaskedEq(mask), value)
}

fn rule(argument: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompRule, JailError> {
    all_of(vec![is(argument, compare, value)?])
}

fn all_of(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, JailError> {
    SeccompRule::new(conditions).map_err(named)
}

/// The lower half of the argument decides: these are all 32 bits wide.
fn is(argument: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompCondition, JailError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value).map_err(named)
}

fn named(error: impl std::fmt::Display) -> JailError {
    JailError::Filter(error.to_string())
}
