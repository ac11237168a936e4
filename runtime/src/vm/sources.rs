//! The host's devices that a machine is made with, opened before the jail
//! takes the file system away.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};

use kvm_ioctls::Kvm;
use rustix::fs::{Mode, OFlags, openat};
use userfaultfd::{FeatureFlags, Uffd};

use super::regions::RegionError;
use crate::sys::userfault;
use crate::vcpu::CpuTable;

/// Devices that any number of machines can be made with.
#[derive(Debug)]
pub(super) struct Sources {
    kvm: Result<File, io::Error>,
    /// Absent on kernels before 6.1, which have a system call instead.
    userfault: Option<File>,
    /// The folder `/proc`, in which `self` is whoever looks.
    proc: File,
    /// What KVM offers on this host, if it was asked: it takes its time to say.
    cpus: Option<CpuTable>,
}

impl Sources {
    /// Opens them. A host without KVM is told about when a machine is made.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            kvm: File::options().read(true).write(true).open("/dev/kvm"),
            userfault: File::options().read(true).write(true).open("/dev/userfaultfd").ok(),
            proc: File::open("/proc")?,
            cpus: None,
        })
    }

    /// The same, with what KVM offers, for many machines to be measured by. If
    /// KVM cannot say, each machine asks by itself and hears why.
    pub(super) fn with_cpus(self) -> Self {
        let cpus = self.kvm().ok().and_then(|kvm| CpuTable::supported(&kvm).ok());
        Self { cpus, ..self }
    }

    /// What KVM offers, if it was asked.
    pub(super) fn cpus(&self) -> Option<&CpuTable> {
        self.cpus.as_ref()
    }

    /// KVM, with a descriptor of its own.
    pub(super) fn kvm(&self) -> Result<Kvm, io::Error> {
        match &self.kvm {
            Ok(file) => Ok(kvm::adopt(file.try_clone()?)),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        }
    }

    /// A userfaultfd of the calling process.
    pub(super) fn userfault(&self, features: FeatureFlags) -> Result<Uffd, RegionError> {
        userfault::open_through(self.userfault.as_ref(), features).map_err(RegionError::Open)
    }

    /// A file in the calling process's folder of `/proc`.
    pub(super) fn of_this_process(&self, name: &'static str) -> Result<File, RegionError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        openat(self.proc.as_fd(), format!("self/{name}"), flags, Mode::empty())
            .map(File::from)
            .map_err(|errno| RegionError::Proc { name, source: errno.into() })
    }
}

mod kvm {
    #![expect(unsafe_code, reason = "Kvm takes only a raw descriptor")]

    use super::{File, FromRawFd, IntoRawFd, Kvm};

    pub(super) fn adopt(file: File) -> Kvm {
        // SAFETY: the descriptor was owned and is given up here, so the new
        // value is its only owner.
        unsafe { Kvm::from_raw_fd(file.into_raw_fd()) }
    }
}
