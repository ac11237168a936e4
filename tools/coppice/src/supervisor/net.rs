//! The host's ends of a machine's network devices.
//!
//! A fork begins with the ethernet address that its parent had, so its cable
//! is plugged in only when its agent has taken an address of its own: two
//! machines on one bridge never answer to the same one.

use anyhow::{Context, Result, bail};
use coppice_runtime::protocol::NetConfig;
use coppice_runtime::sys::tap::Tap;

use crate::cable::Cable;

/// Network devices that one machine may have.
const NETS_MAX: usize = 8;

/// A network device of a machine that runs.
#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) tap: Tap,
    pub(crate) mac: [u8; 6],
}

impl Net {
    /// Makes the host's end, not plugged in yet.
    pub(crate) fn new(cable: &Cable, mac: [u8; 6]) -> Result<Self> {
        let own = format!("cop{:08x}", u32::from_le_bytes(random()?));
        let tap = match cable {
            Cable::Loose => Tap::open(&own, None),
            Cable::Bridge(bridge) => Tap::open(&own, Some(bridge)),
            Cable::Tap(name) => Tap::open(name, None),
        };
        let tap = tap.with_context(|| {
            format!("no network device for --net {cable}: it takes root or CAP_NET_ADMIN, /dev/net/tun, and the bridge or tap that it names")
        })?;
        Ok(Self { tap, mac })
    }

    /// What the machine is made with.
    pub(crate) fn config(&self) -> NetConfig {
        NetConfig { mac: self.mac }
    }
}

/// An address that is locally administered and one machine's.
pub(crate) fn new_mac() -> Result<[u8; 6]> {
    let [a, b, c, d, e] = random()?;
    Ok([0x02, a, b, c, d, e])
}

/// Plugs all cables in, which is harmless if they are.
pub(crate) fn plug(nets: &[Net]) -> Result<()> {
    nets.iter().try_for_each(|net| Ok(net.tap.bring_up()?))
}

/// Keeps all cables out until [`plug`].
pub(crate) fn unplug(nets: &[Net]) -> Result<()> {
    nets.iter().try_for_each(|net| Ok(net.tap.take_down()?))
}

/// The address as people write it.
pub(crate) fn spell(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Refuses more devices than a machine has room for.
pub(crate) fn check_count(cables: &[Cable]) -> Result<()> {
    if cables.len() > NETS_MAX {
        bail!("a machine has at most {NETS_MAX} network devices, not {}", cables.len());
    }
    Ok(())
}

/// The cables of `count` forks: as asked, else as their parent's, else loose.
pub(crate) fn of_forks(
    source: &str,
    (devices, count): (usize, u32),
    asked: &[Cable],
    parent: Option<&[Cable]>,
) -> Result<Vec<Cable>> {
    if asked.is_empty() {
        return Ok(match parent {
            Some(cables) => cables.iter().map(Cable::of_fork).collect(),
            None => vec![Cable::Loose; devices],
        });
    }
    if asked.len() != devices {
        bail!(
            "{source} was captured with {devices} network devices, and a machine that continues from it has as many: give --net {devices} times, not {}",
            asked.len()
        );
    }
    if count > 1
        && let Some(Cable::Tap(name)) = asked.iter().find(|cable| matches!(cable, Cable::Tap(_)))
    {
        bail!("{count} machines cannot share the tap device {name}: use `--net bridge:NAME`");
    }
    Ok(asked.to_vec())
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap(name: &str) -> Cable {
        Cable::Tap(name.to_owned())
    }

    #[test]
    fn forks_get_what_was_asked_or_what_their_parent_has() {
        let bridge = Cable::Bridge("br0".to_owned());
        let parent = [bridge.clone(), tap("vm0")];
        let cables = of_forks("web", (2, 5), &[], Some(&parent)).unwrap();
        assert_eq!(cables, [bridge.clone(), Cable::Loose]);
        assert_eq!(of_forks("web", (1, 5), &[], None).unwrap(), [Cable::Loose]);
        assert_eq!(of_forks("web", (1, 1), &[tap("a")], None).unwrap(), [tap("a")]);
        let error = of_forks("web", (1, 2), &[tap("a")], None).unwrap_err().to_string();
        assert!(error.contains("2 machines cannot share the tap device a"), "{error}");
        let error = of_forks("web", (0, 1), &[bridge], None).unwrap_err().to_string();
        assert!(error.contains("captured with 0 network devices"), "{error}");
    }

    #[test]
    fn an_address_has_six_bytes() {
        assert_eq!(spell([2, 0, 0xa, 0xff, 1, 0x10]), "02:00:0a:ff:01:10");
        assert!(check_count(&vec![Cable::Loose; 9]).is_err());
    }
}
