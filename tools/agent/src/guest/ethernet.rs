//! Ethernet addresses: forks that share a network must not share them.

#![expect(unsafe_code, reason = "the address of a network device is set by an ioctl")]

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// `SIOCSIFHWADDR`
const SET_ADDRESS: libc::Ioctl = 0x8924;
/// `ARPHRD_ETHER`
const ETHERNET: u16 = 1;

/// `struct ifreq` of the kernel's ABI with a `struct sockaddr` in it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    family: u16,
    address: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == 40);

/// Gives the machine's network devices these addresses, in the order of the
/// devices' names. Those for which there is no device are left over.
pub(super) fn set_addresses(addresses: &[[u8; 6]]) -> io::Result<()> {
    for (device, address) in devices(Path::new("/sys/class/net"))?.iter().zip(addresses) {
        set_address(device, *address)?;
    }
    Ok(())
}

/// Devices with a driver of their own: no loopback, bridge or tunnel.
fn devices(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(names),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if let Ok(name) = entry.file_name().into_string()
            && entry.path().join("device").exists()
        {
            names.push(name);
        }
    }
    names.sort_unstable_by_key(|name| (name.len(), name.clone()));
    Ok(names)
}

fn set_address(device: &str, address: [u8; 6]) -> io::Result<()> {
    let mut request = Request { name: [0; 16], family: ETHERNET, address: [0; 22] };
    let name = device.as_bytes();
    let room = request.name.get_mut(..name.len()).ok_or(io::ErrorKind::InvalidInput)?;
    room.copy_from_slice(name);
    request.address[..6].copy_from_slice(&address);
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    // SAFETY: the ioctl reads one `struct ifreq`, alive for the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SET_ADDRESS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_come_in_the_order_of_their_numbers() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["eth10", "eth2", "eth0"] {
            std::fs::create_dir_all(folder.path().join(name).join("device")).unwrap();
        }
        std::fs::create_dir(folder.path().join("lo")).unwrap();
        assert_eq!(devices(folder.path()).unwrap(), ["eth0", "eth2", "eth10"]);
        assert!(devices(&folder.path().join("absent")).unwrap().is_empty());
    }
}
