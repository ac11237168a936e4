//! A message channel between two Coppice processes on one host.
//!
//! A connected pair of unix stream sockets carries length-prefixed `postcard`
//! messages, each with up to [`MAX_DESCRIPTORS`] file descriptors. The
//! descriptors ride on the first byte of the message's header, so a message
//! and its descriptors can never be paired wrongly.
//!
//! ```text
//! ┌──────────────┬──────────────┬───────────────┐
//! │ body_len u32 │ descriptors  │ body          │
//! │ little-endian│ u32          │ body_len bytes│
//! └──────────────┴──────────────┴───────────────┘
//! ```

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The kernel refuses more than this many descriptors in one message
/// (`SCM_MAX_FD`); a longer list travels in several messages.
pub const MAX_DESCRIPTORS: usize = 253;

/// A body longer than this is refused before anything is allocated.
pub const MAX_BODY: usize = 64 << 20;

const HEADER: usize = 8;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other process closed its end.
    #[error("the other process closed the channel")]
    Closed,
    /// A system call failed.
    #[error("channel: {0}")]
    Io(#[from] std::io::Error),
    /// The peer announced a body or descriptor list over the limit.
    #[error("channel: a message of {body} bytes with {descriptors} descriptors is over the limit")]
    TooLarge {
        /// Announced body length in bytes.
        body: usize,
        /// Announced number of descriptors.
        descriptors: usize,
    },
    /// The body is not a message of the expected type.
    #[error("channel: malformed message")]
    Malformed(#[from] postcard::Error),
    /// Fewer descriptors arrived than the header announced.
    #[error("channel: {announced} descriptors announced, {received} received")]
    LostDescriptors {
        /// How many the header announced.
        announced: usize,
        /// How many the kernel delivered.
        received: usize,
    },
}

/// One end of the channel.
#[derive(Debug)]
pub struct Channel {
    socket: UnixStream,
}

impl Channel {
    /// Wraps a connected stream socket.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket }
    }

    /// A connected pair, both ends close-on-exec.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (left, right) = UnixStream::pair()?;
        Ok((Self::new(left), Self::new(right)))
    }

    /// A second handle on the same end, so that one thread can receive while
    /// another sends.
    pub fn try_clone(&self) -> Result<Self, ChannelError> {
        Ok(Self::new(self.socket.try_clone()?))
    }

    /// The socket below, for polling.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Gives the socket back.
    pub fn into_socket(self) -> UnixStream {
        self.socket
    }

    /// Sends one message with its descriptors; blocks until it is written.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let body = postcard::to_stdvec(message)?;
        let too_large =
            || ChannelError::TooLarge { body: body.len(), descriptors: descriptors.len() };
        if body.len() > MAX_BODY || descriptors.len() > MAX_DESCRIPTORS {
            return Err(too_large());
        }
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend(u32::try_from(body.len()).map_err(|_| too_large())?.to_le_bytes());
        bytes.extend(u32::try_from(descriptors.len()).map_err(|_| too_large())?.to_le_bytes());
        bytes.extend(&body);

        let sent = send_first(&self.socket, &bytes, descriptors)?;
        (&self.socket).write_all(&bytes[sent..]).map_err(closed)
    }

    /// Receives one message with its descriptors; blocks until it is whole.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let mut header = [0; HEADER];
        let (got, received) = receive_first(&self.socket, &mut header)?;
        (&self.socket).read_exact(&mut header[got..]).map_err(closed)?;
        let [b0, b1, b2, b3, d0, d1, d2, d3] = header;
        let body = usize::try_from(u32::from_le_bytes([b0, b1, b2, b3])).unwrap_or(usize::MAX);
        let announced = usize::try_from(u32::from_le_bytes([d0, d1, d2, d3])).unwrap_or(usize::MAX);
        if body > MAX_BODY || announced > MAX_DESCRIPTORS {
            return Err(ChannelError::TooLarge { body, descriptors: announced });
        }
        if received.len() != announced {
            return Err(ChannelError::LostDescriptors { announced, received: received.len() });
        }
        let mut bytes = vec![0; body];
        (&self.socket).read_exact(&mut bytes).map_err(closed)?;
        Ok((postcard::from_bytes(&bytes)?, received))
    }
}

fn send_first(
    socket: &UnixStream,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> Result<usize, ChannelError> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    loop {
        match sendmsg(socket.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(sent) => return Ok(sent),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(closed(errno.into())),
        }
    }
}

fn receive_first(
    socket: &UnixStream,
    header: &mut [u8; HEADER],
) -> Result<(usize, Vec<OwnedFd>), ChannelError> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(header)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Ok(message) => break message,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(closed(errno.into())),
        }
    };
    if message.bytes == 0 {
        return Err(ChannelError::Closed);
    }
    let received = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        })
        .flatten()
        .collect();
    Ok((message.bytes, received))
}

fn closed(error: std::io::Error) -> ChannelError {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error.kind() {
        BrokenPipe | ConnectionReset | UnexpectedEof => ChannelError::Closed,
        _ => ChannelError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek;

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (left, right) = Channel::pair().unwrap();
        let mut file = std::fs::File::from(
            rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
        );
        file.write_all(b"hello").unwrap();
        left.send(&("first", 7u32), &[file.as_fd()]).unwrap();
        left.send(&("second", 8u32), &[]).unwrap();

        let ((text, number), mut files) = right.receive::<(String, u32)>().unwrap();
        assert_eq!((text.as_str(), number), ("first", 7));
        let mut same = std::fs::File::from(files.remove(0));
        same.rewind().unwrap();
        let mut read = String::new();
        same.read_to_string(&mut read).unwrap();
        assert_eq!(read, "hello");
        assert_eq!(right.receive::<(String, u32)>().unwrap().0, ("second".to_owned(), 8));
    }

    #[test]
    fn a_large_body_crosses_whole() {
        let (left, right) = Channel::pair().unwrap();
        let body: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let expected = body.clone();
        let sender = std::thread::spawn(move || left.send(&body, &[]).unwrap());
        assert_eq!(right.receive::<Vec<u8>>().unwrap().0, expected);
        sender.join().unwrap();
    }

    #[test]
    fn an_oversized_header_is_refused_before_allocation() {
        let (left, right) = UnixStream::pair().unwrap();
        (&left).write_all(&[0xff; 8]).unwrap();
        let error = Channel::new(right).receive::<u32>().unwrap_err();
        assert!(matches!(error, ChannelError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn a_closed_peer_is_named() {
        let (left, right) = Channel::pair().unwrap();
        drop(left);
        assert!(matches!(right.receive::<u32>().unwrap_err(), ChannelError::Closed));
    }
}
