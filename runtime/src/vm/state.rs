//! A machine's saved state: everything but memory and disks.
//!
//! ```text
//! "COPPVMST" │ version u32 little-endian │ MachineState in postcard
//! ```

use serde::{Deserialize, Serialize};

use super::chips::ChipState;
use crate::devices::SerialSnapshot;
use crate::devices::virtio::{TransportState, VsockState};
use crate::protocol::MachineConfig;
use crate::vcpu::{CpuTable, VcpuState};

const MAGIC: [u8; 8] = *b"COPPVMST";
const VERSION: u32 = 1;

/// Why bytes are not the state of this machine.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum StateError {
    /// Something else.
    #[error("machine state: the bytes do not start with its magic")]
    Magic,
    /// Written by another version.
    #[error("machine state: version {0}, this program reads version {VERSION}")]
    Version(u32),
    /// Cut off or damaged.
    #[error("machine state: malformed or cut off")]
    Malformed,
    /// Of another machine.
    #[error("machine state: {field} is {saved} in the saved state, {wanted} in the configuration")]
    Config {
        /// What differs.
        field: &'static str,
        /// Saved value.
        saved: String,
        /// Wanted value.
        wanted: String,
    },
    /// A part is missing or there is one too many.
    #[error("machine state: {found} {part}, expected {expected}")]
    Parts {
        /// Which part.
        part: &'static str,
        /// How many there are.
        found: usize,
        /// How many the configuration has.
        expected: usize,
    },
}

/// All of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct MachineState {
    pub(super) config: MachineConfig,
    pub(super) cpus: CpuTable,
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) chips: ChipState,
    pub(super) serial: SerialSnapshot,
    pub(super) virtio: Vec<TransportState>,
    pub(super) vsock: VsockState,
}

impl MachineState {
    /// As bytes.
    pub(super) fn encode(&self) -> Result<Vec<u8>, postcard::Error> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(postcard::to_stdvec(self)?);
        Ok(bytes)
    }

    /// From bytes.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or(StateError::Magic)?;
        let (version, body) = rest.split_first_chunk().ok_or(StateError::Malformed)?;
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        match postcard::take_from_bytes(body) {
            Ok((state, [])) => Ok(state),
            _ => Err(StateError::Malformed),
        }
    }

    /// Checks that this is the state of a machine with `config` and `devices`
    /// virtio devices.
    pub(super) fn check(&self, config: &MachineConfig, devices: usize) -> Result<(), StateError> {
        let saved = &self.config;
        differs("the memory size", saved.memory_bytes, config.memory_bytes)?;
        differs("the number of vCPUs", saved.vcpus, config.vcpus)?;
        differs("the number of disks", saved.disks.len(), config.disks.len())?;
        for (saved, wanted) in saved.disks.iter().zip(&config.disks) {
            differs("the length of a disk", saved.len, wanted.len)?;
            differs("a disk's being read-only", saved.read_only, wanted.read_only)?;
        }
        let vcpus = usize::try_from(config.vcpus).unwrap_or(usize::MAX);
        for (part, found, expected) in
            [("vCPUs", self.vcpus.len(), vcpus), ("virtio devices", self.virtio.len(), devices)]
        {
            if found != expected {
                return Err(StateError::Parts { part, found, expected });
            }
        }
        Ok(())
    }
}

fn differs<T: PartialEq + ToString>(
    field: &'static str,
    saved: T,
    wanted: T,
) -> Result<(), StateError> {
    if saved == wanted {
        return Ok(());
    }
    let (saved, wanted) = (saved.to_string(), wanted.to_string());
    Err(StateError::Config { field, saved, wanted })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_bytes_are_named() {
        let error = |bytes: &[u8]| MachineState::decode(bytes).unwrap_err();
        assert_eq!(error(b""), StateError::Magic);
        assert_eq!(error(b"COPPVMST"), StateError::Malformed);
        assert_eq!(error(b"COPPVMST\x07\0\0\0"), StateError::Version(7));
        assert_eq!(error(b"COPPVMST\x01\0\0\0\xff\xff"), StateError::Malformed);
    }
}
