//! The guest-visible configuration inside a snapshot record.
//!
//! One version byte, then the `postcard` bytes of: version 1, a
//! [`MachineConfig`]; version 2, that and the number of network devices (u32),
//! which is not 0. So each configuration has one encoding, which can be part
//! of a snapshot's id.

use anyhow::{Context, Result, bail};
use coppice_runtime::protocol::MachineConfig;

const VERSION: u8 = 1;
const VERSION_WITH_NETS: u8 = 2;

/// What a guest sees of its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) machine: MachineConfig,
    /// Its network devices.
    pub(crate) nets: usize,
}

/// The bytes for a record.
pub(crate) fn encode(machine: &MachineConfig, nets: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![if nets == 0 { VERSION } else { VERSION_WITH_NETS }];
    bytes.extend(postcard::to_stdvec(machine)?);
    if nets != 0 {
        bytes.extend(postcard::to_stdvec(&u32::try_from(nets)?)?);
    }
    Ok(bytes)
}

/// What a record's bytes say.
pub(crate) fn decode(bytes: &[u8]) -> Result<Recorded> {
    const DAMAGED: &str = "the snapshot's machine configuration is damaged";
    let (&version, rest) =
        bytes.split_first().context("the snapshot has no machine configuration")?;
    if !(VERSION..=VERSION_WITH_NETS).contains(&version) {
        bail!(
            "the snapshot's machine configuration has version {version}, and this coppice knows only {VERSION} and {VERSION_WITH_NETS}: use a newer one"
        );
    }
    let (machine, rest) = postcard::take_from_bytes(rest).context(DAMAGED)?;
    let (nets, rest) = match version {
        VERSION => (0, rest),
        _ => postcard::take_from_bytes::<u32>(rest).context(DAMAGED)?,
    };
    if !rest.is_empty() || (nets == 0) != (version == VERSION) {
        bail!("{DAMAGED}");
    }
    Ok(Recorded { machine, nets: usize::try_from(nets)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_survives_and_a_newer_version_is_refused() {
        let machine = MachineConfig { memory_bytes: 1 << 28, vcpus: 2, disks: Vec::new() };
        for nets in [0, 1, 300] {
            let bytes = encode(&machine, nets).unwrap();
            assert_eq!(decode(&bytes).unwrap(), Recorded { machine: machine.clone(), nets });
        }
        let mut bytes = encode(&machine, 0).unwrap();
        assert_eq!(bytes[0], 1, "older programs read it");
        bytes[0] = 9;
        assert!(decode(&bytes).unwrap_err().to_string().contains("version 9"));
        assert!(decode(&[]).is_err());
    }

    #[test]
    fn other_bytes_are_damage() {
        let machine = MachineConfig { memory_bytes: 1 << 28, vcpus: 2, disks: Vec::new() };
        let whole = encode(&machine, 1).unwrap();
        assert!(decode(&whole[..whole.len() - 1]).is_err());
        assert!(decode(&[&whole[..], &[0]].concat()).is_err(), "one byte too many");
        let none = [&whole[..whole.len() - 1], &[0]].concat();
        assert!(decode(&none).is_err(), "no devices have another encoding");
    }
}
