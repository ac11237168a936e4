//! The guest-visible configuration inside a snapshot record.
//!
//! One version byte, then the `postcard` bytes of [`MachineConfig`]. The
//! encoding has one form for each value, so it can be part of a snapshot's id.

use anyhow::{Context, Result, bail};
use coppice_runtime::protocol::MachineConfig;

const VERSION: u8 = 1;

/// The bytes for a record.
pub(crate) fn encode(config: &MachineConfig) -> Result<Vec<u8>> {
    let mut bytes = vec![VERSION];
    bytes.extend(postcard::to_stdvec(config)?);
    Ok(bytes)
}

/// What a record's bytes say.
pub(crate) fn decode(bytes: &[u8]) -> Result<MachineConfig> {
    match bytes.split_first() {
        Some((&VERSION, rest)) => {
            postcard::from_bytes(rest).context("the snapshot's machine configuration is damaged")
        }
        Some((&version, _)) => bail!(
            "the snapshot's machine configuration has version {version}, and this coppice knows only {VERSION}: use a newer one"
        ),
        None => bail!("the snapshot has no machine configuration"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_survives_and_a_newer_version_is_refused() {
        let config = MachineConfig { memory_bytes: 1 << 28, vcpus: 2, disks: Vec::new() };
        let mut bytes = encode(&config).unwrap();
        assert_eq!(decode(&bytes).unwrap(), config);
        bytes[0] = 9;
        assert!(decode(&bytes).unwrap_err().to_string().contains("version 9"));
        assert!(decode(&[]).is_err());
    }
}
