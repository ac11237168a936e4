//! Where the frames of a machine's network device go on this host.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One cable, as `--net` names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Cable {
    /// A tap device of its own that nothing is connected to yet.
    Loose,
    /// A tap device of its own on this bridge.
    Bridge(String),
    /// This tap device.
    Tap(String),
}

impl Cable {
    /// What a fork of its machine gets: a tap device has one machine.
    pub(crate) fn of_fork(&self) -> Self {
        match self {
            Self::Bridge(_) => self.clone(),
            Self::Loose | Self::Tap(_) => Self::Loose,
        }
    }
}

impl FromStr for Cable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "tap" => Ok(Self::Loose),
            Some(("tap", name)) if !name.is_empty() => Ok(Self::Tap(name.to_owned())),
            Some(("bridge", name)) if !name.is_empty() => Ok(Self::Bridge(name.to_owned())),
            _ => Err("use `tap`, `tap:NAME` or `bridge:NAME`".to_owned()),
        }
    }
}

impl fmt::Display for Cable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loose => f.write_str("tap"),
            Self::Bridge(name) => write!(f, "bridge:{name}"),
            Self::Tap(name) => write!(f, "tap:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cables_have_one_spelling() {
        for text in ["tap", "tap:vm0", "bridge:br0"] {
            assert_eq!(text.parse::<Cable>().unwrap().to_string(), text);
        }
        for text in ["", "tap:", "bridge", "bridge:", "br0", "nat:x"] {
            assert!(text.parse::<Cable>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn forks_share_a_bridge_and_never_a_tap() {
        assert_eq!(Cable::Tap("a".to_owned()).of_fork(), Cable::Loose);
        let bridge = Cable::Bridge("b".to_owned());
        assert_eq!(bridge.of_fork(), bridge);
    }
}
