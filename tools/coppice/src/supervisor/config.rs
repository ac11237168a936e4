//! The guest-visible configuration inside a snapshot record.
//!
//! One version byte, then the `postcard` bytes of: version 1, a
//! [`MachineConfig`]; version 2, that and the number of network devices (u32),
//! which is not 0; version 3, a [`MachineConfig`], the number of network devices
//! and the kernel's command line, where the snapshot has the kernel; version 4, a
//! [`MachineConfig`], the number of network devices, perhaps the command line, and
//! 16 bytes that no other snapshot has, where it is all there is of a machine. So
//! each configuration has one encoding, which can be part of a snapshot's id.

use anyhow::{Context, Result, bail};
use coppice_runtime::protocol::MachineConfig;

const VERSION: u8 = 1;
const VERSION_WITH_NETS: u8 = 2;
const VERSION_WITH_KERNEL: u8 = 3;
const VERSION_OF_REST: u8 = 4;

/// What a guest sees of its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) machine: MachineConfig,
    /// Its network devices.
    pub(crate) nets: usize,
    /// The kernel's command line; only where the snapshot has the kernel.
    pub(crate) cmdline: Option<String>,
    /// Of the snapshot that a machine is without a process: no two machines are
    /// the same one, though all else of them be equal.
    pub(crate) rest: Option<[u8; 16]>,
}

/// The bytes for a record.
pub(crate) fn encode(recorded: &Recorded) -> Result<Vec<u8>> {
    let Recorded { machine, nets, cmdline, rest } = recorded;
    let nets = u32::try_from(*nets)?;
    if let Some(rest) = rest {
        let mut bytes = vec![VERSION_OF_REST];
        bytes.extend(postcard::to_stdvec(&(machine, nets, cmdline, rest))?);
        return Ok(bytes);
    }
    let version = match (cmdline, nets) {
        (Some(_), _) => VERSION_WITH_KERNEL,
        (None, 0) => VERSION,
        (None, _) => VERSION_WITH_NETS,
    };
    let mut bytes = vec![version];
    bytes.extend(postcard::to_stdvec(machine)?);
    if version != VERSION {
        bytes.extend(postcard::to_stdvec(&nets)?);
    }
    if let Some(cmdline) = cmdline {
        bytes.extend(postcard::to_stdvec(cmdline)?);
    }
    Ok(bytes)
}

/// What a record's bytes say.
pub(crate) fn decode(bytes: &[u8]) -> Result<Recorded> {
    const DAMAGED: &str = "the snapshot's machine configuration is damaged";
    let (&version, rest) =
        bytes.split_first().context("the snapshot has no machine configuration")?;
    if !(VERSION..=VERSION_OF_REST).contains(&version) {
        bail!(
            "the snapshot's machine configuration has version {version}, and this coppice knows only {VERSION} to {VERSION_OF_REST}: use a newer one"
        );
    }
    if version == VERSION_OF_REST {
        let (all, left) = postcard::take_from_bytes(rest).context(DAMAGED)?;
        let (machine, nets, cmdline, rest): (MachineConfig, u32, Option<String>, [u8; 16]) = all;
        if !left.is_empty() {
            bail!("{DAMAGED}");
        }
        return Ok(Recorded { machine, nets: usize::try_from(nets)?, cmdline, rest: Some(rest) });
    }
    let (machine, rest) = postcard::take_from_bytes(rest).context(DAMAGED)?;
    let (nets, rest) = match version {
        VERSION => (0, rest),
        _ => postcard::take_from_bytes::<u32>(rest).context(DAMAGED)?,
    };
    let (cmdline, rest) = match version {
        VERSION_WITH_KERNEL => {
            let (cmdline, rest) = postcard::take_from_bytes(rest).context(DAMAGED)?;
            (Some(cmdline), rest)
        }
        _ => (None, rest),
    };
    if !rest.is_empty() || (version == VERSION_WITH_NETS && nets == 0) {
        bail!("{DAMAGED}");
    }
    Ok(Recorded { machine, nets: usize::try_from(nets)?, cmdline, rest: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(nets: usize, cmdline: Option<&str>) -> Recorded {
        let machine = MachineConfig { memory_bytes: 1 << 28, vcpus: 2, disks: Vec::new() };
        Recorded { machine, nets, cmdline: cmdline.map(str::to_owned), rest: None }
    }

    #[test]
    fn a_configuration_survives_and_a_newer_version_is_refused() {
        for nets in [0, 1, 300] {
            for cmdline in [None, Some(""), Some("quiet")] {
                let recorded = recorded(nets, cmdline);
                assert_eq!(decode(&encode(&recorded).unwrap()).unwrap(), recorded);
                let rest = Recorded { rest: Some([nets.to_le_bytes()[0]; 16]), ..recorded };
                assert_eq!(decode(&encode(&rest).unwrap()).unwrap(), rest);
            }
        }
        let mut bytes = encode(&recorded(0, None)).unwrap();
        assert_eq!(bytes[0], 1, "older programs read it");
        assert_eq!(encode(&recorded(2, None)).unwrap()[0], 2, "older programs read it");
        bytes[0] = 9;
        assert!(decode(&bytes).unwrap_err().to_string().contains("version 9"));
        assert!(decode(&[]).is_err());
    }

    #[test]
    fn other_bytes_are_damage() {
        for cmdline in [None, Some("quiet")] {
            let whole = encode(&recorded(1, cmdline)).unwrap();
            assert!(decode(&whole[..whole.len() - 1]).is_err());
            assert!(decode(&[&whole[..], &[0]].concat()).is_err(), "one byte too many");
        }
        let whole = encode(&recorded(1, None)).unwrap();
        let none = [&whole[..whole.len() - 1], &[0]].concat();
        assert!(decode(&none).is_err(), "no devices have another encoding");
    }
}
