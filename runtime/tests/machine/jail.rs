//! What a machine's process could do if its guest had taken it over.
//!
//! Each case plays that role in a process of its own, jailed as machines are,
//! with the descriptors that a machine has.
#![expect(unsafe_code, reason = "attacks that no safe function offers")]

use std::fs::File;
use std::io::ErrorKind;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use coppice_runtime::jail;
use coppice_runtime::protocol::{VmmReply, VmmRequest, ZygoteMessage, ZygoteReply, ZygoteRequest};
use coppice_runtime::sys::channel::Channel;
use rustix::fs::{Mode, OFlags, fchmod};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, geteuid, getppid, kill_process};

use crate::guest::has_kvm;
use crate::harness::memfd;

const CASE: &str = "COPPICE_TEST_JAILED";
/// 128 + SIGSYS.
const FORBIDDEN: i32 = 159;

/// Not a test by itself: the process that plays the part.
#[test]
fn jailed_process() {
    let Ok(case) = std::env::var(CASE) else { return };
    let pool = File::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    jail::empty_root().unwrap();
    jail::forgo_capabilities();
    if case == "without the filter" {
        jail::drop_privileges().unwrap();
        held_by_namespaces_and_user(&pool);
    } else {
        jail::enter().unwrap();
        held_by_filter(&case, &pool);
    }
    println!("the jail held");
    std::process::exit(0);
}

/// The test runner's own main thread runs the test, so that the process has
/// one thread when it is jailed.
fn play(case: &str, pool: &File) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "jail::jailed_process", "--nocapture", "--quiet", "--test-threads=1"])
        .env(CASE, case)
        .stdin(Stdio::from(pool.try_clone().unwrap()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap()
}

/// As the page server makes it: only root's, and read-only for machines.
fn pool() -> (File, File) {
    let file = memfd(&[7; 8192]);
    fchmod(&file, Mode::RUSR).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let read_only = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    (file, File::from(read_only.unwrap()))
}

#[test]
fn namespaces_and_user_hold_without_the_filter() {
    if !geteuid().is_root() {
        eprintln!("skipped: the user id of a jailed process changes only for root");
        return;
    }
    let (pool, read_only) = pool();
    let output = play("without the filter", &read_only);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("the jail held"), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let mut bytes = [0; 8192];
    pool.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [7; 8192]);
}

fn held_by_namespaces_and_user(pool: &File) {
    // No file of the host, by any way there.
    for path in ["/etc/passwd", "/proc/self/mem", "/dev/kvm", "/sys", "/tmp", "../../etc/passwd"] {
        assert_eq!(File::open(path).unwrap_err().kind(), ErrorKind::NotFound, "{path}");
    }
    assert_eq!(std::fs::read_dir("/").unwrap().count(), 0);
    File::create("/file").unwrap_err();
    // The pool cannot be written, nor made writable.
    pool.write_at(&[9], 0).unwrap_err();
    assert_eq!(fchmod(pool, Mode::RWXU), Err(Errno::PERM));
    assert!(map_writable(pool).is_err());
    File::open(format!("/proc/self/fd/{}", pool.as_raw_fd())).unwrap_err();
    // No other process can be reached.
    let parent = getppid().unwrap_or(Pid::INIT);
    assert_eq!(kill_process(parent, Signal::TERM), Err(Errno::PERM));
    assert_eq!(kill_process(Pid::INIT, Signal::TERM), Err(Errno::PERM));
    assert!(trace(parent).is_err());
    // Nobody can be reached over a network, nor root regained.
    TcpStream::connect_timeout(&([127, 0, 0, 1], 9).into(), Duration::from_secs(1)).unwrap_err();
    UnixListener::bind("/socket").unwrap_err();
    assert_eq!(rustix::thread::set_thread_uid(rustix::process::Uid::ROOT), Err(Errno::PERM));
    Command::new("/bin/sh").spawn().unwrap_err();
}

fn map_writable(pool: &File) -> Result<(), std::io::Error> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let descriptor = pool.as_raw_fd();
    // SAFETY: a new mapping at an address that the kernel chooses.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_SHARED, descriptor, 0)
    };
    if at == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

fn trace(process: Pid) -> Result<(), std::io::Error> {
    let process = process.as_raw_nonzero().get();
    // SAFETY: attaching takes no pointer.
    let outcome = unsafe { libc::ptrace(libc::PTRACE_SEIZE, process, 0, 0) };
    if outcome == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// An attempt, and the call that the filter forbids in it.
const FORBIDDEN_CALLS: [(&str, i64); 11] = [
    ("socket", libc::SYS_socket),
    ("exec", libc::SYS_execve),
    ("fork", libc::SYS_clone),
    ("kill", libc::SYS_kill),
    ("ptrace", libc::SYS_ptrace),
    ("code", libc::SYS_mmap),
    ("chmod", libc::SYS_fchmod),
    ("namespace", libc::SYS_unshare),
    ("ring", libc::SYS_io_uring_setup),
    ("block", libc::SYS_fcntl),
    ("block by ioctl", libc::SYS_ioctl),
];

#[test]
fn the_filter_ends_whoever_tries_a_forbidden_call() {
    let (_pool, read_only) = pool();
    for (case, call) in FORBIDDEN_CALLS {
        let output = play(case, &read_only);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(FORBIDDEN), "{case}: {said}");
        assert!(said.contains(&format!("forbidden system call {call:03}")), "{case}: {said}");
    }
}

#[test]
fn opening_files_is_refused_and_threads_still_start() {
    let (_pool, read_only) = pool();
    let output = play("open", &read_only);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

fn held_by_filter(case: &str, pool: &File) {
    let raw = |number: i64, first: i64, second: i64, third: i64| {
        // SAFETY: the call does not return, or fails: pointers are null.
        unsafe { libc::syscall(number, first, second, third, 0, 0, 0) }
    };
    let anonymous = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    match case {
        "socket" => drop(raw(libc::SYS_socket, i64::from(libc::AF_INET), 1, 0)),
        "exec" => drop(raw(libc::SYS_execve, 0, 0, 0)),
        "fork" => drop(raw(libc::SYS_clone, i64::from(libc::SIGCHLD), 0, 0)),
        "kill" => drop(raw(libc::SYS_kill, 1, i64::from(libc::SIGTERM), 0)),
        "ptrace" => drop(raw(libc::SYS_ptrace, i64::from(libc::PTRACE_TRACEME), 0, 0)),
        "chmod" => drop(raw(libc::SYS_fchmod, i64::from(pool.as_raw_fd()), 0o777, 0)),
        "namespace" => drop(raw(libc::SYS_unshare, i64::from(libc::CLONE_NEWUSER), 0, 0)),
        "ring" => drop(raw(libc::SYS_io_uring_setup, 1, 0, 0)),
        "block" => {
            let flags = rustix::fs::fcntl_getfl(pool).unwrap();
            rustix::fs::fcntl_setfl(pool, flags | OFlags::NONBLOCK).unwrap();
            rustix::fs::fcntl_setfl(pool, flags).unwrap();
        }
        "block by ioctl" => drop(rustix::io::ioctl_fionbio(pool, false)),
        "hole" | "hole when settled" => return invent_zeros(pool, case == "hole when settled"),
        "code" => {
            let executable = i64::from(libc::PROT_READ | libc::PROT_EXEC);
            // SAFETY: a new mapping at an address that the kernel chooses.
            unsafe { libc::syscall(libc::SYS_mmap, 0, 4096, executable, anonymous, -1, 0) };
        }
        "open" => {
            assert_eq!(File::open("/").unwrap_err().raw_os_error(), Some(libc::ENOSYS));
            assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
            return;
        }
        other => panic!("no such case: {other}"),
    }
    panic!("{case} was not forbidden");
}

/// Why a machine that is made maps no file any more, and that it does not.
#[test]
fn a_settled_process_cannot_put_zeros_into_a_pool() {
    for (case, invented) in [("hole", true), ("hole when settled", false)] {
        let file = memfd(&[]);
        file.set_len(16 << 12).unwrap();
        let output = play(case, &file);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{case}: {said}");
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) > 0, invented);
    }
}

/// A thread that is there already tries every way to a mapping that the page
/// server does not serve.
fn invent_zeros(pool: &File, settled: bool) {
    let descriptor = pool.as_raw_fd();
    let map = move || {
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, descriptor, 0)
        };
        if at == libc::MAP_FAILED { None } else { Some(at.cast::<u8>().expose_provenance()) }
    };
    let served = map().unwrap();
    let (go, gone) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        gone.recv().unwrap();
        if let Some(at) = map() {
            let byte = std::ptr::with_exposed_provenance::<u8>(at);
            // SAFETY: the file is as long as the mapping, which stays.
            assert_eq!(unsafe { byte.read_volatile() }, 0);
        }
        map().is_some()
    });
    if settled {
        jail::settle().unwrap();
    }
    go.send(()).unwrap();
    assert_eq!(thread.join().unwrap(), !settled);
    if settled {
        nothing_else_leads_there(pool, served);
    }
}

fn nothing_else_leads_there(pool: &File, served: usize) {
    let at = std::ptr::with_exposed_provenance_mut::<libc::c_void>(served);
    let refused = || std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM);
    // SAFETY: the mapping may move: nobody uses it.
    let moved = unsafe { libc::mremap(at, 4096, 8192, libc::MREMAP_MAYMOVE) };
    assert!(moved == libc::MAP_FAILED && refused());
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_COLLAPSE] {
        // SAFETY: the advice changes no bytes.
        assert!(unsafe { libc::madvise(at, 4096, advice) } == -1 && refused());
    }
    // UFFDIO_UNREGISTER and UFFDIO_REGISTER.
    for request in [0x8010_aa01, 0xc020_aa00] {
        let mut range = [0_u64; 4];
        // SAFETY: the argument is at least as long as that of either ioctl.
        let result = unsafe { libc::ioctl(pool.as_raw_fd(), request, range.as_mut_ptr()) };
        assert!(result == -1 && refused());
    }
    // What a machine goes on doing.
    let mut large = vec![1_u8; 1 << 20];
    large.resize(64 << 20, 2);
    assert_eq!(std::thread::spawn(move || large[1 << 20]).join().unwrap(), 2);
}

/// Not a test by itself: the zygote that the next test talks to.
#[test]
fn zygote_process() {
    if std::env::var_os("COPPICE_TEST_ZYGOTE").is_none() {
        return;
    }
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let code = coppice_runtime::zygote_main(Channel::new(stdin.into()));
    std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
}

#[test]
fn a_forked_process_is_jailed_serves_and_ends_with_its_channel() {
    if !has_kvm() {
        return;
    }
    let (zygote, theirs) = Channel::pair().unwrap();
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "jail::zygote_process", "--nocapture", "--quiet", "--test-threads=1"])
        .env("COPPICE_TEST_ZYGOTE", "1")
        .stdin(Stdio::from(OwnedFd::from(theirs.into_socket())))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..3 {
        one_life(&zygote);
    }
    drop(zygote);
    assert!(process.wait().unwrap().success());
}

fn one_life(zygote: &Channel) {
    let (ours, theirs) = Channel::pair().unwrap();
    let theirs = OwnedFd::from(theirs.into_socket());
    zygote.send(&ZygoteRequest::Spawn, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let (ZygoteMessage::Reply(reply), descriptors) = zygote.receive().unwrap();
    let ZygoteReply::Spawned { pid } = reply.unwrap();

    // It answers, and by then it is jailed.
    let log = tempfile::tempfile().unwrap();
    ours.send(&VmmRequest::Log, &[log.as_fd()]).unwrap();
    let (answer, _) = ours.receive::<coppice_runtime::protocol::VmmMessage>().unwrap();
    let logging = coppice_runtime::protocol::VmmMessage::Reply(Ok(VmmReply::Logging));
    assert_eq!(answer, logging);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].trim().to_owned()
    };
    assert_eq!(field("CapEff:"), "0000000000000000");
    assert_eq!(field("CapBnd:"), "0000000000000000");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    if geteuid().is_root() {
        let own = (0x7000_0000 + pid).to_string();
        assert!(field("Uid:").split_whitespace().all(|id| id == own), "{}", field("Uid:"));
    }

    drop(ours);
    let mut ended = [rustix::event::PollFd::new(&descriptors[0], rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut ended, None).unwrap();
}
