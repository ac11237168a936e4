//! Everything of the runtime that reads what a guest, or a process that its guest
//! has taken over, wrote, under one roof, for fuzzers. Not part of the interface.

use crate::devices::hostile_serial;
use crate::devices::virtio::hostile::Device;
use crate::protocol::{PagerMessage, VmmMessage, VmmRequest};

/// Something that must survive any input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A disk and its driver.
    Block,
    /// A disk that may only be read.
    ReadOnlyBlock,
    /// A network device.
    Net,
    /// Streams between guest and host.
    Vsock,
    /// Entropy.
    Rng,
    /// Free page reporting.
    Balloon,
    /// The serial port and the console log behind it.
    Serial,
    /// What a machine's process says to the supervisor, and what it is told.
    Messages,
}

impl Target {
    /// Plays the input.
    pub fn play(self, input: &[u8]) {
        match self {
            Self::Block => Device::Block.play(input),
            Self::ReadOnlyBlock => Device::ReadOnlyBlock.play(input),
            Self::Net => Device::Net.play(input),
            Self::Vsock => Device::Vsock.play(input),
            Self::Rng => Device::Rng.play(input),
            Self::Balloon => Device::Balloon.play(input),
            Self::Serial => hostile_serial(input),
            Self::Messages => decode(input),
        }
    }
}

/// What is decoded is encoded as what was read.
fn decode(input: &[u8]) {
    if let Ok(message) = postcard::from_bytes::<VmmMessage>(input) {
        let again = postcard::to_stdvec(&message).expect("it was read");
        assert_eq!(postcard::from_bytes::<VmmMessage>(&again).as_ref(), Ok(&message));
    }
    if let Ok(request) = postcard::from_bytes::<VmmRequest>(input) {
        let again = postcard::to_stdvec(&request).expect("it was read");
        assert_eq!(postcard::from_bytes::<VmmRequest>(&again).as_ref(), Ok(&request));
    }
    drop(postcard::from_bytes::<PagerMessage>(input));
}
