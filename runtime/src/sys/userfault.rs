//! A userfaultfd as the page server uses it: faults come out, wakes and
//! poison go in. Pages themselves go in through `sys::side` only.
//!
//! Nothing here can change bytes that the calling process owns: waking lets a
//! thread run again, and poisoning a page makes its next access fail.
#![expect(unsafe_code, reason = "ioctls that the userfaultfd crate lacks, and its descriptor")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use userfaultfd::{
    Error, Event, EventBuffer, FaultKind, FeatureFlags, RegisterMode, Uffd, UffdBuilder,
};

/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`, Linux 5.19.
const FEATURE_WP_SHMEM: u64 = 1 << 12;

/// `UFFD_FEATURE_POISON`, Linux 6.6.
const FEATURE_POISON: u64 = 1 << 14;

/// `struct uffdio_poison` of the kernel's ABI.
#[repr(C)]
struct PoisonArgs {
    start: u64,
    len: u64,
    mode: u64,
    updated: i64,
}

/// `_IOWR(0xAA, 0x08, struct uffdio_poison)`.
const UFFDIO_POISON: libc::Ioctl = 0xC020_AA08;
const _: () = assert!(size_of::<PoisonArgs>() == 0x20);

/// `struct uffdio_api` of the kernel's ABI.
#[repr(C)]
struct ApiArgs {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `_IO(0xAA, 0x00)`.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xAA00;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::Ioctl = 0xC018_AA3F;
const UFFD_API: u64 = 0xAA;
const _: () = assert!(size_of::<ApiArgs>() == 0x18);

/// Opens a userfaultfd of this process through the device if it is given,
/// else by the system call. It never blocks, closes on exec and takes faults
/// that happen inside the kernel.
pub(crate) fn open_through(device: Option<&File>, features: FeatureFlags) -> io::Result<Uffd> {
    let Some(device) = device else {
        return Userfault::with_features(features).map(|userfault| userfault.0);
    };
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the ioctl takes flags and gives a new descriptor or -1.
    let raw = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let uffd = unsafe { Uffd::from_raw_fd(raw) };
    let mut args = ApiArgs { api: UFFD_API, features: features.bits(), ioctls: 0 };
    // SAFETY: the argument is the structure of this ioctl, alive for the call.
    if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut args) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(uffd)
}

/// What every machine's userfaultfd can do: report missing pages of pools, and
/// writes to pages that were protected.
pub(crate) fn machine_features() -> FeatureFlags {
    FeatureFlags::MISSING_SHMEM
        | FeatureFlags::PAGEFAULT_FLAG_WP
        | FeatureFlags::from_bits_retain(FEATURE_WP_SHMEM)
}

/// A thread of the process waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Where it touched memory.
    pub address: u64,
    /// Whether it wrote to a page that is protected; otherwise the page is
    /// missing.
    pub protected: bool,
}

/// A userfaultfd of this or of another process.
#[derive(Debug)]
pub struct Userfault(Uffd);

impl Userfault {
    /// A new one for this process. It never blocks, closes on exec and takes
    /// faults that happen inside the kernel, as those of KVM do.
    pub fn new() -> io::Result<Self> {
        Self::with_features(machine_features())
    }

    fn with_features(features: FeatureFlags) -> io::Result<Self> {
        UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .require_features(features)
            .create()
            .map(Self)
            .map_err(to_io)
    }

    /// Takes over one that another process opened.
    pub fn adopt(descriptor: OwnedFd) -> io::Result<Self> {
        // Without it, polling the descriptor reports an error for ever.
        let flags = rustix::fs::fcntl_getfl(&descriptor)?;
        rustix::fs::fcntl_setfl(&descriptor, flags | rustix::fs::OFlags::NONBLOCK)?;
        // SAFETY: the descriptor was owned and is given up here, so the new
        // value is its only owner.
        Ok(Self(unsafe { Uffd::from_raw_fd(descriptor.into_raw_fd()) }))
    }

    /// Whether the kernel can poison a page.
    pub fn can_poison() -> bool {
        let wanted = machine_features() | FeatureFlags::from_bits_retain(FEATURE_POISON);
        Self::with_features(wanted).is_ok()
    }

    /// Registers a range of this process for missing pages.
    pub fn register(&self, address: u64, len: usize) -> io::Result<()> {
        self.0.register(pointer(address), len).map(drop).map_err(to_io)
    }

    /// Registers a range of its process for writes to protected pages, besides
    /// missing ones if they are reported there. The kernel cannot take this
    /// back without a moment in which missing pages are not reported either,
    /// so it stays.
    pub fn register_for_protection(&self, address: u64, len: u64, missing: bool) -> io::Result<()> {
        let mode = match missing {
            true => RegisterMode::MISSING | RegisterMode::WRITE_PROTECT,
            false => RegisterMode::WRITE_PROTECT,
        };
        self.0.register_with_mode(pointer(address), size(len), mode).map(drop).map_err(to_io)
    }

    /// Makes the next write to each page of a range of its process a fault.
    pub fn protect(&self, address: u64, len: u64) -> io::Result<()> {
        again(|| self.0.write_protect(pointer(address), size(len)))
    }

    /// Lets a range be written again, and wakes the threads that wait there.
    pub fn unprotect(&self, address: u64, len: u64) -> io::Result<()> {
        again(|| self.0.remove_write_protection(pointer(address), size(len), true))
    }

    /// Reads the faults that are waiting and hands them over.
    pub fn faults(
        &self,
        buffer: &mut EventBuffer,
        sink: &mut dyn FnMut(Fault),
    ) -> io::Result<usize> {
        let events = loop {
            match self.0.read_events(buffer).map_err(to_io) {
                Ok(events) => break events,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        let mut count = 0;
        for event in events {
            count += 1;
            if let Event::Pagefault { addr, kind, .. } = event.map_err(to_io)? {
                let protected = kind == FaultKind::WriteProtected;
                sink(Fault { address: addr as u64, protected });
            }
        }
        Ok(count)
    }

    /// Lets the threads that wait in this range of their process try again.
    pub fn wake(&self, address: u64, len: usize) -> io::Result<()> {
        self.0.wake(pointer(address), len).map_err(to_io)
    }

    /// Makes every access to a range of its process fail, and wakes the
    /// threads that wait there. Pages that are mapped already stay.
    pub fn poison(&self, address: u64, len: u64) -> io::Result<()> {
        loop {
            let mut args = PoisonArgs { start: address, len, mode: 0, updated: 0 };
            // SAFETY: the argument is the structure of this ioctl, alive for
            // the call; the kernel changes no bytes of memory.
            let result = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_POISON, &raw mut args) };
            match result {
                0 => return Ok(()),
                _ => match io::Error::last_os_error() {
                    error if error.raw_os_error() == Some(libc::EAGAIN) => {}
                    error if error.raw_os_error() == Some(libc::EEXIST) => {
                        return self.wake(address, usize::try_from(len).unwrap_or(usize::MAX));
                    }
                    error => return Err(error),
                },
            }
        }
    }

    pub(super) fn inner(&self) -> &Uffd {
        &self.0
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// Tries until the kernel has decided: it says EAGAIN while the address space
/// changes under it.
fn again(mut attempt: impl FnMut() -> userfaultfd::Result<()>) -> io::Result<()> {
    loop {
        match attempt().map_err(to_io) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
            decided => return decided,
        }
    }
}

fn size(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

fn pointer(address: u64) -> *mut std::ffi::c_void {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(usize::MAX))
}

/// The crate's errors carry an errno where the kernel gave one.
pub(super) fn to_io(error: Error) -> io::Error {
    match error {
        Error::CopyFailed(errno) | Error::ZeropageFailed(errno) | Error::SystemError(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        Error::PartiallyCopied(_) => io::Error::from_raw_os_error(libc::EAGAIN),
        Error::OpenDevUserfaultfd(source) => source,
        other => io::Error::other(other),
    }
}
