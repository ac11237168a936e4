//! Starts a program without forking the agent.
//!
//! `posix_spawn` shares the agent's memory until the program runs, so no page
//! table is copied; std's `Command` cannot open a session or choose a terminal
//! without giving that up.

#![expect(unsafe_code, reason = "posix_spawn has no safe wrapper that can open a session")]

use std::ffi::{CStr, CString, NulError};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::Errno;
use rustix::process::Pid;

use crate::protocol::{Exec, RefusalKind};
use crate::tree::to_path;

/// Where programs are looked up if nothing says otherwise.
pub(super) const DEFAULT_PATH: &[u8] =
    b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the program's descriptors 0, 1 and 2 become.
#[derive(Debug)]
pub(super) enum Stdio<'a> {
    Pipes {
        stdin: Option<&'a OwnedFd>,
        stdout: &'a OwnedFd,
        stderr: &'a OwnedFd,
    },
    /// The terminal at this path becomes the controlling one.
    Terminal(&'a CStr),
}

#[derive(Debug, thiserror::Error)]
pub(super) enum SpawnError {
    #[error("no program was named")]
    Nothing,
    #[error("an argument, variable or path contains a NUL byte")]
    Nul(#[from] NulError),
    #[error("{program}: command not found")]
    NotFound { program: String },
    #[error("{directory}: no such directory to start in")]
    NoDirectory { directory: String },
    #[error("{program}: {source}")]
    CannotExecute { program: String, source: io::Error },
    #[error("cannot prepare the program: {0}")]
    System(#[from] Errno),
}

impl SpawnError {
    pub(super) fn kind(&self) -> RefusalKind {
        match self {
            Self::Nothing | Self::Nul(_) => RefusalKind::Invalid,
            Self::NotFound { .. } => RefusalKind::CommandNotFound,
            Self::NoDirectory { .. } => RefusalKind::NotFound,
            Self::CannotExecute { .. } => RefusalKind::CannotExecute,
            Self::System(_) => RefusalKind::System,
        }
    }
}

/// A program with all that `posix_spawn` wants, ready to start.
#[derive(Debug)]
pub(super) struct Prepared {
    argv: Vec<CString>,
    environment: Vec<CString>,
    directory: CString,
    /// Paths to try, in order.
    candidates: Vec<CString>,
}

impl Prepared {
    pub(super) fn new(
        exec: &Exec,
        base: &[(Vec<u8>, Vec<u8>)],
        home: &[u8],
    ) -> Result<Self, SpawnError> {
        let program = exec.argv.first().filter(|name| !name.is_empty());
        let program = program.ok_or(SpawnError::Nothing)?;
        let argv = exec.argv.iter().map(|arg| CString::new(arg.as_slice()));
        let inherited =
            base.iter().filter(|(name, _)| !exec.env.iter().any(|(own, _)| own == name));
        let environment = inherited.chain(&exec.env);
        let path = environment.clone().rfind(|(name, _)| name == b"PATH");
        let path = path.map_or(DEFAULT_PATH, |(_, value)| value.as_slice());
        Ok(Self {
            candidates: candidates(program, path)?,
            argv: argv.collect::<Result<_, _>>()?,
            environment: environment
                .map(|(name, value)| CString::new([&name[..], value].join(&b'=')))
                .collect::<Result<_, _>>()?,
            directory: CString::new(exec.cwd.as_deref().unwrap_or(home))?,
        })
    }

    /// Starts the program as the leader of a new session.
    pub(super) fn start(&self, stdio: &Stdio<'_>) -> Result<Pid, SpawnError> {
        let attributes = Attributes::new()?;
        let actions = Actions::new(&self.directory, stdio)?;
        let mut refusal = Errno::NOENT;
        for path in &self.candidates {
            match self.try_start(path, &attributes, &actions) {
                Ok(pid) => return Ok(pid),
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                // As execvp: remember it, a later directory may do better.
                Err(Errno::ACCESS) => refusal = Errno::ACCESS,
                Err(errno) => return Err(self.failure(errno)),
            }
        }
        Err(self.failure(refusal))
    }

    fn try_start(&self, path: &CStr, with: &Attributes, actions: &Actions) -> Result<Pid, Errno> {
        let argv = pointers(&self.argv);
        let environment = pointers(&self.environment);
        let mut pid: libc::pid_t = 0;
        // SAFETY: `path` and every string in the two NULL-terminated arrays
        // are NUL-terminated and outlive the call, which copies nothing out of
        // them later; attributes and actions are initialized.
        let result = unsafe {
            libc::posix_spawn(
                &raw mut pid,
                path.as_ptr(),
                &raw const actions.0,
                &raw const with.0,
                argv.as_ptr(),
                environment.as_ptr(),
            )
        };
        checked(result)?;
        Pid::from_raw(pid).ok_or(Errno::CHILD)
    }

    fn failure(&self, errno: Errno) -> SpawnError {
        let directory = Path::new(std::ffi::OsStr::from_bytes(self.directory.to_bytes()));
        if !directory.is_dir() {
            return SpawnError::NoDirectory { directory: directory.display().to_string() };
        }
        let program = self.argv.first().map(CString::as_c_str).unwrap_or_default();
        let program = to_path(program.to_bytes()).display().to_string();
        match errno {
            Errno::NOENT | Errno::NOTDIR => SpawnError::NotFound { program },
            errno => SpawnError::CannotExecute { program, source: errno.into() },
        }
    }
}

/// The paths under which a program may be found.
fn candidates(program: &[u8], path: &[u8]) -> Result<Vec<CString>, NulError> {
    if program.contains(&b'/') {
        return Ok(vec![CString::new(program)?]);
    }
    path.split(|&byte| byte == b':')
        .map(|directory| if directory.is_empty() { b"." } else { directory })
        .map(|directory| CString::new([directory, program].join(&b'/')))
        .collect()
}

fn pointers(strings: &[CString]) -> Vec<*mut libc::c_char> {
    let own = strings.iter().map(|string| string.as_ptr().cast_mut());
    own.chain([std::ptr::null_mut()]).collect()
}

/// Owns initialized spawn attributes.
struct Attributes(libc::posix_spawnattr_t);

/// Opens a session of its own; glibc's name for 0x80 is not in every libc.
const SPAWN_SETSID: i32 = 0x80;

impl Attributes {
    fn new() -> Result<Self, Errno> {
        let mut raw = MaybeUninit::uninit();
        // SAFETY: the call initializes the object that it is given.
        checked(unsafe { libc::posix_spawnattr_init(raw.as_mut_ptr()) })?;
        // SAFETY: initialized by the call above, which succeeded.
        let mut attributes = Self(unsafe { raw.assume_init() });
        let flags = SPAWN_SETSID | libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        let flags = libc::c_short::try_from(flags).map_err(|_| Errno::INVAL)?;
        // SAFETY: the attributes are initialized.
        checked(unsafe { libc::posix_spawnattr_setflags(&raw mut attributes.0, flags) })?;
        let none = signal_set(&[])?;
        // SAFETY: both objects are initialized.
        checked(unsafe {
            libc::posix_spawnattr_setsigmask(&raw mut attributes.0, &raw const none)
        })?;
        // Rust ignores SIGPIPE; programs expect its default.
        let defaults = signal_set(&[libc::SIGPIPE])?;
        // SAFETY: both objects are initialized.
        checked(unsafe {
            libc::posix_spawnattr_setsigdefault(&raw mut attributes.0, &raw const defaults)
        })?;
        Ok(attributes)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: initialized by `new`, destroyed only here.
        unsafe { libc::posix_spawnattr_destroy(&raw mut self.0) };
    }
}

/// A set of the given signals.
pub(super) fn signal_set(signals: &[libc::c_int]) -> Result<libc::sigset_t, Errno> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the call initializes the set that it is given.
    libc_result(unsafe { libc::sigemptyset(set.as_mut_ptr()) })?;
    // SAFETY: initialized by the call above, which succeeded.
    let mut set = unsafe { set.assume_init() };
    for &signal in signals {
        // SAFETY: the set is initialized.
        libc_result(unsafe { libc::sigaddset(&raw mut set, signal) })?;
    }
    Ok(set)
}

/// Owns initialized file actions. They refer to descriptors by number, which
/// the caller keeps open until the program has started.
struct Actions(libc::posix_spawn_file_actions_t);

impl Actions {
    fn new(directory: &CStr, stdio: &Stdio<'_>) -> Result<Self, Errno> {
        let mut raw = MaybeUninit::uninit();
        // SAFETY: the call initializes the object that it is given.
        checked(unsafe { libc::posix_spawn_file_actions_init(raw.as_mut_ptr()) })?;
        // SAFETY: initialized by the call above, which succeeded.
        let mut actions = Self(unsafe { raw.assume_init() });
        match stdio {
            Stdio::Pipes { stdin, stdout, stderr } => {
                match stdin {
                    Some(stdin) => actions.duplicate(stdin.as_raw_fd(), 0)?,
                    None => actions.open(0, c"/dev/null", libc::O_RDONLY)?,
                }
                actions.duplicate(stdout.as_raw_fd(), 1)?;
                actions.duplicate(stderr.as_raw_fd(), 2)?;
            }
            // The first terminal that a session leader opens becomes the
            // controlling one.
            Stdio::Terminal(path) => {
                actions.open(0, path, libc::O_RDWR)?;
                actions.duplicate(0, 1)?;
                actions.duplicate(0, 2)?;
            }
        }
        // SAFETY: the actions are initialized; the string is copied.
        checked(unsafe {
            libc::posix_spawn_file_actions_addchdir_np(&raw mut actions.0, directory.as_ptr())
        })?;
        Ok(actions)
    }

    fn duplicate(&mut self, from: libc::c_int, to: libc::c_int) -> Result<(), Errno> {
        // SAFETY: the actions are initialized; the numbers are only recorded.
        checked(unsafe { libc::posix_spawn_file_actions_adddup2(&raw mut self.0, from, to) })
    }

    fn open(&mut self, as_fd: libc::c_int, path: &CStr, flags: libc::c_int) -> Result<(), Errno> {
        // SAFETY: the actions are initialized; the string is copied.
        checked(unsafe {
            libc::posix_spawn_file_actions_addopen(&raw mut self.0, as_fd, path.as_ptr(), flags, 0)
        })
    }
}

impl Drop for Actions {
    fn drop(&mut self) {
        // SAFETY: initialized by `new`, destroyed only here.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.0) };
    }
}

/// The posix_spawn family returns its error.
fn checked(result: libc::c_int) -> Result<(), Errno> {
    if result == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(result)) }
}

/// Everything else sets `errno`.
fn libc_result(result: libc::c_int) -> Result<(), Errno> {
    if result == 0 {
        return Ok(());
    }
    let errno = io::Error::last_os_error().raw_os_error();
    Err(errno.map_or(Errno::INVAL, Errno::from_raw_os_error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_slash_is_looked_up_in_every_directory() {
        let found = candidates(b"ls", b"/bin::/usr/bin").unwrap();
        assert_eq!(found, [c"/bin/ls".to_owned(), c"./ls".to_owned(), c"/usr/bin/ls".to_owned()]);
        assert_eq!(candidates(b"./ls", b"/bin").unwrap(), [c"./ls".to_owned()]);
    }

    #[test]
    fn own_variables_replace_inherited_ones() {
        let exec = Exec {
            argv: vec![b"x".to_vec()],
            env: vec![(b"PATH".to_vec(), b"/own".to_vec())],
            ..Exec::default()
        };
        let base = [(b"PATH".to_vec(), b"/base".to_vec()), (b"A".to_vec(), b"1".to_vec())];
        let prepared = Prepared::new(&exec, &base, b"/").unwrap();
        assert_eq!(prepared.environment, [c"A=1".to_owned(), c"PATH=/own".to_owned()]);
        assert_eq!(prepared.candidates, [c"/own/x".to_owned()]);
    }
}
