//! vsock packet headers, apart from where they lie in guest memory.

use virtio_vsock::packet::VsockPacket;

/// The host's context id.
pub(super) const HOST_CID: u64 = 2;
/// The guest's context id. It may be equal in all machines: nothing but the
/// device's own queue tells them apart.
pub(super) const GUEST_CID: u64 = 3;

pub(super) const TYPE_STREAM: u16 = 1;

pub(super) const FLAG_SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const FLAG_SHUTDOWN_SEND: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }

    fn of(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// The ports of a connection, which name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ports {
    /// On the host's side.
    pub(super) host: u32,
    /// In the guest.
    pub(super) guest: u32,
}

/// A header, without what follows from the direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) ports: Ports,
    pub(super) op: Op,
    pub(super) flags: u32,
    /// Bytes of data behind the header.
    pub(super) len: u32,
    /// Room of the sender's buffer in bytes.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has taken out of its buffer, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

/// What a packet from the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FromGuest {
    /// For one of our connections.
    Ours(Header),
    /// Something that is answered with a reset.
    Refuse(Ports),
    /// Nothing that could be answered.
    Ignore,
}

/// Reads a packet's header.
pub(super) fn read(packet: &VsockPacket<'_, ()>) -> FromGuest {
    let ports = Ports { host: packet.dst_port(), guest: packet.src_port() };
    if packet.src_cid() != GUEST_CID || packet.dst_cid() != HOST_CID {
        return FromGuest::Ignore;
    }
    match (Op::of(packet.op()), packet.type_()) {
        // A reset is never answered with one.
        (Some(Op::Reset), kind) if kind != TYPE_STREAM => FromGuest::Ignore,
        (Some(op), TYPE_STREAM) => FromGuest::Ours(Header {
            ports,
            op,
            flags: packet.flags(),
            len: packet.len(),
            buf_alloc: packet.buf_alloc(),
            fwd_cnt: packet.fwd_cnt(),
        }),
        _ => FromGuest::Refuse(ports),
    }
}

/// Writes a header for the guest.
pub(super) fn write(packet: &mut VsockPacket<'_, ()>, header: &Header) {
    packet
        .set_src_cid(HOST_CID)
        .set_dst_cid(GUEST_CID)
        .set_src_port(header.ports.host)
        .set_dst_port(header.ports.guest)
        .set_len(header.len)
        .set_type(TYPE_STREAM)
        .set_op(header.op.number())
        .set_flags(header.flags)
        .set_buf_alloc(header.buf_alloc)
        .set_fwd_cnt(header.fwd_cnt);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_number() {
        for number in 1..=7 {
            assert_eq!(Op::of(number).unwrap().number(), number);
        }
        assert_eq!((Op::of(0), Op::of(8)), (None, None));
    }
}
