//! Tap devices: the host's end of a machine's network cable.
//!
//! A device that is made here goes when its last descriptor is closed; one
//! that exists already (`ip tuntap add … mode tap`) is taken and stays.
#![expect(unsafe_code, reason = "the ioctls of network devices")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Bytes of an interface's name, with the zero that ends it.
const NAME_LEN: usize = 16;
/// `struct virtio_net_hdr_v1`, which precedes each frame.
const HEADER_LEN: libc::c_int = 12;

/// `_IOW('T', 202, int)`, `_IOW('T', 208, unsigned)`, `_IOW('T', 216, int)`.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const SIOCGIFFLAGS: libc::Ioctl = 0x8913;
const SIOCSIFFLAGS: libc::Ioctl = 0x8914;
const SIOCGIFINDEX: libc::Ioctl = 0x8933;
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// A frame a call, no packet information, a virtio header before each frame.
const TAP_FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;
/// `IFF_UP`
const UP: u16 = 1;

/// Why there is no tap device.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is no interface's.
    #[error("{0:?} is no name of a network interface: 1 to 15 bytes without `/` and spaces")]
    Name(String),
    /// A step failed.
    #[error("tap device {name}: cannot {step}: {source}")]
    Step {
        /// The device.
        name: String,
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// `struct ifreq` of the kernel's ABI, as far as it is used here.
#[repr(C)]
struct Request {
    name: [u8; NAME_LEN],
    /// Flags (u16) or an index (u32), in the first bytes.
    value: [u8; 24],
}

const _: () = assert!(size_of::<Request>() == 40);

impl Request {
    fn new(name: &str, value: u32) -> Result<Self, TapError> {
        let bytes = name.as_bytes();
        let usable = |byte: &u8| *byte != b'/' && !byte.is_ascii_whitespace() && *byte != 0;
        if bytes.is_empty() || bytes.len() >= NAME_LEN || !bytes.iter().all(usable) {
            return Err(TapError::Name(name.to_owned()));
        }
        let mut request = Self { name: [0; NAME_LEN], value: [0; 24] };
        request.name[..bytes.len()].copy_from_slice(bytes);
        request.value[..4].copy_from_slice(&value.to_le_bytes());
        Ok(request)
    }

    fn value(&self) -> u32 {
        u32::from_le_bytes([self.value[0], self.value[1], self.value[2], self.value[3]])
    }
}

/// An open tap device.
#[derive(Debug)]
pub struct Tap {
    name: String,
    file: File,
}

impl Tap {
    /// Opens or makes the device; frames go through `bridge` if one is given,
    /// once it is up. Reads and writes do not block.
    ///
    /// # Errors
    /// If the name is none, or the kernel refuses: it needs `CAP_NET_ADMIN`
    /// unless the device exists and belongs to the caller.
    pub fn open(name: &str, bridge: Option<&str>) -> Result<Self, TapError> {
        let mut request = Request::new(name, u32::from(TAP_FLAGS))?;
        let step = |step| move |source| TapError::Step { name: name.to_owned(), step, source };
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(step("open /dev/net/tun"))?;
        call(&file, TUNSETIFF, &mut request).map_err(step("make or take it"))?;
        let size = HEADER_LEN;
        // SAFETY: the ioctl reads one integer.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })
            .map_err(step("set the length of its header"))?;
        // Frames for the guest are finished: any driver takes them.
        // SAFETY: the ioctl takes its argument by value.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, 0) })
            .map_err(step("turn offloads off"))?;
        let control = control().map_err(step("open a control socket"))?;
        if let Some(bridge) = bridge {
            join(&control, name, bridge)?.map_err(step("join it to its bridge"))?;
        }
        Ok(Self { name: name.to_owned(), file })
    }

    /// Lets frames through, in both directions.
    ///
    /// # Errors
    /// As [`Tap::open`].
    pub fn bring_up(&self) -> Result<(), TapError> {
        let step = |step| move |source| TapError::Step { name: self.name.clone(), step, source };
        let control = control().map_err(step("open a control socket"))?;
        set_up(&control, &self.name, true)?.map_err(step("bring it up"))
    }

    /// Lets no frames through.
    ///
    /// # Errors
    /// As [`Tap::open`].
    pub fn take_down(&self) -> Result<(), TapError> {
        let step = |step| move |source| TapError::Step { name: self.name.clone(), step, source };
        let control = control().map_err(step("open a control socket"))?;
        set_up(&control, &self.name, false)?.map_err(step("take it down"))
    }

    /// Its name on the host.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor for the machine.
    pub fn file(&self) -> &File {
        &self.file
    }
}

fn control() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?)
}

/// Does nothing where nothing is to be done, which needs no privilege.
fn set_up(control: &OwnedFd, name: &str, is_up: bool) -> Result<io::Result<()>, TapError> {
    let mut request = Request::new(name, 0)?;
    Ok(call(control, SIOCGIFFLAGS, &mut request).and_then(|()| {
        let flags = request.value() & 0xffff;
        let wanted = if is_up { flags | u32::from(UP) } else { flags & !u32::from(UP) };
        if flags == wanted {
            return Ok(());
        }
        request.value[..4].copy_from_slice(&wanted.to_le_bytes());
        call(control, SIOCSIFFLAGS, &mut request)
    }))
}

fn join(control: &OwnedFd, name: &str, bridge: &str) -> Result<io::Result<()>, TapError> {
    let mut device = Request::new(name, 0)?;
    Ok(call(control, SIOCGIFINDEX, &mut device).and_then(|()| {
        let mut request = Request::new(bridge, device.value()).map_err(io::Error::other)?;
        call(control, SIOCBRADDIF, &mut request)
    }))
}

fn call(descriptor: &impl AsFd, number: libc::Ioctl, request: &mut Request) -> io::Result<()> {
    let descriptor = descriptor.as_fd().as_raw_fd();
    // SAFETY: these ioctls read and write one `struct ifreq`, alive for the
    // call.
    checked(unsafe { libc::ioctl(descriptor, number, std::ptr::from_mut(request)) })
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_lives_as_long_as_its_descriptor() {
        let name = format!("cpt{}", std::process::id());
        let tap = match Tap::open(&name, None) {
            Ok(tap) => tap,
            Err(TapError::Step { source, .. }) if source.kind() != io::ErrorKind::Other => {
                eprintln!("skipped: no tap devices here: {source}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let folder = std::path::Path::new("/sys/class/net").join(tap.name());
        assert!(folder.exists());
        let flags = || std::fs::read_to_string(folder.join("flags")).unwrap();
        for (set, last) in [(true, "3"), (true, "3"), (false, "2"), (false, "2")] {
            if set { tap.bring_up() } else { tap.take_down() }.unwrap();
            assert!(flags().trim().ends_with(last), "{}", flags());
        }
        let mut frame = [0; 2000];
        // Whatever the host says by itself, nothing blocks.
        drop(std::io::Read::read(&mut tap.file(), &mut frame));
        drop(tap);
        assert!(!folder.exists());
    }

    #[test]
    fn names_that_no_interface_has() {
        for name in ["", "a/b", "a b", "sixteen-bytes-is-too-long", "nul\0"] {
            assert!(matches!(Tap::open(name, None), Err(TapError::Name(_))), "{name:?}");
        }
    }
}
