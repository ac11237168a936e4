//! Gives the machine an identity of its own.
//!
//! Order: secrets first. The kernel's random number generator is reseeded
//! before the host learns anything, then the clock, then the names.

#![expect(unsafe_code, reason = "the random device's control calls have no safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::time::{ClockId, Timespec};

use crate::protocol::{Identity, MAX_ENTROPY, MIN_ENTROPY, RefusalKind};

/// Where an identity goes.
#[derive(Debug, Clone)]
pub struct Targets {
    /// Root of the files that hold it; `/` in a machine.
    pub root: PathBuf,
    /// Whether the running kernel takes it too: random numbers, clock, host
    /// name. A test that only writes files leaves the host alone.
    pub kernel: bool,
}

impl Targets {
    /// This machine.
    pub fn machine() -> Self {
        Self { root: PathBuf::from("/"), kernel: true }
    }
}

/// Why a machine did not take its identity.
#[derive(Debug, thiserror::Error)]
pub(super) enum RenewError {
    #[error("the identity is refused: {0}")]
    Invalid(&'static str),
    #[error("cannot {what}: {source}")]
    System { what: &'static str, source: io::Error },
}

impl RenewError {
    pub(super) fn kind(&self) -> RefusalKind {
        match self {
            Self::Invalid(_) => RefusalKind::Invalid,
            Self::System { .. } => RefusalKind::System,
        }
    }
}

/// Takes an identity over, or says why not.
pub(super) fn renew(targets: &Targets, identity: &Identity) -> Result<(), RenewError> {
    check(identity)?;
    if targets.kernel {
        reseed(&identity.entropy).map_err(system("reseed the random numbers"))?;
        set_clock(identity.realtime_ns).map_err(system("set the clock"))?;
        rustix::system::sethostname(identity.hostname.as_bytes())
            .map_err(|errno| system("set the host name")(errno.into()))?;
        super::ethernet::set_addresses(&identity.ethernet)
            .map_err(system("set the ethernet addresses"))?;
    }
    let etc = targets.root.join("etc");
    rewrite(&etc.join("machine-id"), &identity.machine_id)
        .map_err(system("write /etc/machine-id"))?;
    rewrite(&etc.join("hostname"), &identity.hostname).map_err(system("write /etc/hostname"))
}

fn system(what: &'static str) -> impl Fn(io::Error) -> RenewError {
    move |source| RenewError::System { what, source }
}

fn check(identity: &Identity) -> Result<(), RenewError> {
    let hostname = identity.hostname.as_bytes();
    let letters = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&identity.entropy.len()) {
        return Err(RenewError::Invalid("it needs 64 to 4096 bytes of entropy"));
    }
    if hostname.is_empty() || hostname.len() > 63 || !hostname.iter().all(letters) {
        return Err(RenewError::Invalid("the host name is 1 to 63 letters, digits and hyphens"));
    }
    if hostname.first() == Some(&b'-') || hostname.last() == Some(&b'-') {
        return Err(RenewError::Invalid("the host name neither begins nor ends with a hyphen"));
    }
    // The lowest bit of the first byte means a group of machines.
    if identity.ethernet.iter().any(|address| address[0] & 1 != 0 || *address == [0; 6]) {
        return Err(RenewError::Invalid("an ethernet address is one machine's"));
    }
    let hexadecimal = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if identity.machine_id.len() != 32 || !identity.machine_id.bytes().all(hexadecimal) {
        return Err(RenewError::Invalid("the machine id is 32 lower-case hexadecimal digits"));
    }
    Ok(())
}

/// Writes one line over a file, in place: the usual case is a file of the same
/// length, which then needs no new block.
fn rewrite(path: &Path, line: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    let bytes = [line.as_bytes(), b"\n"].concat();
    file.write_all(&bytes)?;
    let length = bytes.len() as u64;
    if file.metadata()?.len() != length {
        file.set_len(length)?;
    }
    Ok(())
}

fn set_clock(realtime_ns: u64) -> io::Result<()> {
    let seconds = i64::try_from(realtime_ns / 1_000_000_000).map_err(io::Error::other)?;
    let nanos = i64::try_from(realtime_ns % 1_000_000_000).map_err(io::Error::other)?;
    let now = Timespec { tv_sec: seconds, tv_nsec: nanos };
    Ok(rustix::time::clock_settime(ClockId::Realtime, now)?)
}

/// `struct rand_pool_info` of `linux/random.h` with its buffer.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; MAX_ENTROPY],
}

/// `_IOW('R', 0x03, int[2])`
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// Credits fresh entropy and makes the generator use it at once, so that no
/// number drawn afterwards depends on the captured state alone.
fn reseed(entropy: &[u8]) -> io::Result<()> {
    let device = File::open("/dev/urandom")?;
    let mut info = Box::new(RandPoolInfo { entropy_count: 0, buf_size: 0, buf: [0; MAX_ENTROPY] });
    let length = i32::try_from(entropy.len()).map_err(io::Error::other)?;
    info.entropy_count = length.saturating_mul(8);
    info.buf_size = length;
    info.buf[..entropy.len()].copy_from_slice(entropy);
    // SAFETY: the call reads the structure's two integers and `buf_size` bytes
    // after them, all of which `info` holds; it keeps no pointer.
    check_call(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const *info) })?;
    // SAFETY: this call takes no argument.
    check_call(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) })
}

fn check_call(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            generation: 7,
            entropy: vec![1; MIN_ENTROPY],
            realtime_ns: 1_700_000_000_000_000_000,
            hostname: "fork-7".to_owned(),
            machine_id: "0123456789abcdef0123456789abcdef".to_owned(),
            ethernet: Vec::new(),
        }
    }

    #[test]
    fn files_are_rewritten_to_the_exact_new_line() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/hostname"), "a-much-longer-name\n").unwrap();
        let targets = Targets { root: dir.path().to_path_buf(), kernel: false };
        renew(&targets, &identity()).unwrap();
        let read = |name| std::fs::read_to_string(dir.path().join("etc").join(name)).unwrap();
        assert_eq!(read("hostname"), "fork-7\n");
        assert_eq!(read("machine-id"), "0123456789abcdef0123456789abcdef\n");
    }

    #[test]
    fn a_malformed_identity_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let targets = Targets { root: dir.path().to_path_buf(), kernel: false };
        let spoil: [fn(&mut Identity); 6] = [
            |identity| identity.entropy.truncate(MIN_ENTROPY - 1),
            |identity| identity.entropy = vec![0; MAX_ENTROPY + 1],
            |identity| identity.hostname = "a b".to_owned(),
            |identity| identity.hostname = "-a".to_owned(),
            |identity| identity.machine_id = "../../../../etc/passwd".to_owned(),
            |identity| identity.machine_id = "0123456789ABCDEF0123456789ABCDEF".to_owned(),
        ];
        for change in spoil {
            let mut bad = identity();
            change(&mut bad);
            let error = renew(&targets, &bad).unwrap_err();
            assert_eq!(error.kind(), RefusalKind::Invalid);
        }
        assert!(dir.path().join("etc").read_dir().unwrap().next().is_none());
    }
}
