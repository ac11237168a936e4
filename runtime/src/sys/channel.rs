//! A message channel between two Coppice processes on one host.
//!
//! A connected pair of unix stream sockets carries length-prefixed `postcard`
//! messages, each with up to [`DESCRIPTORS_MAX`] file descriptors. The
//! descriptors ride on the first byte of the message's header, so a message
//! and its descriptors can never be paired wrongly. More than the kernel takes
//! at once ride on bytes of their own behind the header.
//!
//! ```text
//! ┌──────────────┬──────────────┬───────────────────────┬───────────────┐
//! │ body_len u32 │ descriptors  │ a zero for each 253   │ body          │
//! │ little-endian│ u32          │ after the first 253   │ body_len bytes│
//! └──────────────┴──────────────┴───────────────────────┴───────────────┘
//! ```
//!
//! Invariant: what a peer announces costs nothing until it arrives, and what
//! arrives is bounded by what this end expects of that peer. A message that lost
//! descriptors was read to its end, and one that was not written to its end is
//! the last one.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Descriptors that the kernel takes at once (`SCM_MAX_FD`).
const GROUP: usize = 253;

/// More descriptors than this do not go with one message. A machine's process
/// may have twice as many open.
pub const DESCRIPTORS_MAX: usize = 2048;

/// A longer body is refused, unless the channel expects more.
pub const BODY_MAX: usize = 64 << 20;

/// The longest body that a header can announce.
const BODY_LIMIT: usize = u32::MAX as usize;

/// Room for a body before its bytes arrive.
const ROOM: usize = 1 << 20;

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
    body_max: usize,
    descriptors_max: usize,
}

impl Channel {
    /// Wraps a connected stream socket.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, body_max: BODY_MAX, descriptors_max: DESCRIPTORS_MAX }
    }

    /// The same with another limit for bodies.
    #[must_use]
    pub fn with_body_max(self, body_max: usize) -> Self {
        Self { body_max: body_max.min(BODY_LIMIT), ..self }
    }

    /// The same with another limit for the descriptors that come with a message.
    #[must_use]
    pub fn with_descriptors_max(self, descriptors_max: usize) -> Self {
        Self { descriptors_max: descriptors_max.min(DESCRIPTORS_MAX), ..self }
    }

    /// The same for a peer that is trusted to send what is needed and no more.
    #[must_use]
    pub fn trusting(self) -> Self {
        self.with_body_max(BODY_LIMIT)
    }

    /// A connected pair, both ends close-on-exec.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (left, right) = UnixStream::pair()?;
        Ok((Self::new(left), Self::new(right)))
    }

    /// A second handle on the same end, so that one thread can receive while
    /// another sends.
    pub fn try_clone(&self) -> Result<Self, ChannelError> {
        let Self { body_max, descriptors_max, .. } = *self;
        Ok(Self { socket: self.socket.try_clone()?, body_max, descriptors_max })
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
        if body.len() > BODY_LIMIT || descriptors.len() > DESCRIPTORS_MAX {
            return Err(too_large());
        }
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend(u32::try_from(body.len()).map_err(|_| too_large())?.to_le_bytes());
        bytes.extend(u32::try_from(descriptors.len()).map_err(|_| too_large())?.to_le_bytes());
        let (first, others) = descriptors.split_at(descriptors.len().min(GROUP));
        if others.is_empty() {
            bytes.extend(&body);
        }
        let sent = send_first(&self.socket, &bytes, first)?;
        let rest = if others.is_empty() { &[][..] } else { &body };
        self.send_rest(&bytes[sent..], others, rest).inspect_err(|_| {
            // What follows half a message could not be understood. It fails only
            // if the other end is closed, which is the goal.
            drop(self.socket.shutdown(Shutdown::Both));
        })
    }

    /// Sends what is left of a message.
    fn send_rest(
        &self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        body: &[u8],
    ) -> Result<(), ChannelError> {
        (&self.socket).write_all(bytes).map_err(closed)?;
        for group in descriptors.chunks(GROUP) {
            // One byte is sent or none.
            send_first(&self.socket, &[0], group)?;
        }
        (&self.socket).write_all(body).map_err(closed)
    }

    /// Receives one message with its descriptors; blocks until it is whole.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        self.receive_up_to(self.body_max)
    }

    /// The same with another limit for this body.
    pub fn receive_up_to<T: DeserializeOwned>(
        &self,
        body_max: usize,
    ) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let mut header = [0; HEADER];
        let room = self.descriptors_max.clamp(1, GROUP);
        let (got, mut received) = receive_first(&self.socket, &mut header, room)?;
        (&self.socket).read_exact(&mut header[got..]).map_err(closed)?;
        let [b0, b1, b2, b3, d0, d1, d2, d3] = header;
        let body = usize::try_from(u32::from_le_bytes([b0, b1, b2, b3])).unwrap_or(usize::MAX);
        let announced = usize::try_from(u32::from_le_bytes([d0, d1, d2, d3])).unwrap_or(usize::MAX);
        if body > body_max || announced > self.descriptors_max {
            return Err(ChannelError::TooLarge { body, descriptors: announced });
        }
        let mut whole = received.len() == announced.min(GROUP);
        let mut left = announced.saturating_sub(GROUP);
        while left > 0 {
            let group = receive_first(&self.socket, &mut [0], room)?.1;
            whole &= group.len() == left.min(GROUP);
            left -= left.min(GROUP);
            received.extend(group);
        }
        let body = self.receive_body(body)?;
        if !whole {
            return Err(ChannelError::LostDescriptors { announced, received: received.len() });
        }
        Ok((postcard::from_bytes(&body)?, received))
    }

    fn receive_body(&self, len: usize) -> Result<Vec<u8>, ChannelError> {
        let mut bytes = Vec::with_capacity(len.min(ROOM));
        let limit = u64::try_from(len).unwrap_or(u64::MAX);
        (&self.socket).take(limit).read_to_end(&mut bytes).map_err(closed)?;
        if bytes.len() < len { Err(ChannelError::Closed) } else { Ok(bytes) }
    }
}

fn send_first(
    socket: &UnixStream,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> Result<usize, ChannelError> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(GROUP))];
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
    header: &mut [u8],
    descriptors_max: usize,
) -> Result<(usize, Vec<OwnedFd>), ChannelError> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(descriptors_max))];
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
    fn a_body_of_many_mebibytes_crosses_where_it_is_expected() {
        let body = vec![0xA5u8; BODY_MAX + 4096];
        for trusting in [true, false] {
            let (left, right) = Channel::pair().unwrap();
            let right = if trusting { right.trusting() } else { right };
            std::thread::scope(|scope| {
                // A receiver that refuses closes its end.
                let sender = scope.spawn(|| left.send(&body, &[]).is_ok());
                let received = right.receive::<Vec<u8>>();
                drop(right);
                match received {
                    Ok((received, _)) => assert!(trusting && received == body),
                    Err(ChannelError::TooLarge { .. }) => assert!(!trusting),
                    Err(other) => panic!("{other}"),
                }
                assert_eq!(sender.join().unwrap(), trusting);
            });
        }
    }

    #[test]
    fn more_descriptors_than_the_kernel_takes_at_once_arrive_in_order() {
        let (left, right) = Channel::pair().unwrap();
        for count in [GROUP, GROUP + 1, 3 * GROUP, 700] {
            let files: Vec<_> = (0..count)
                .map(|number| {
                    let file = tempfile::tempfile().unwrap();
                    file.set_len(number as u64).unwrap();
                    file
                })
                .collect();
            let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            left.send(&"many", &borrowed).unwrap();
            left.send(&"next", &[]).unwrap();
            let (text, received) = right.receive::<String>().unwrap();
            assert_eq!((text.as_str(), received.len()), ("many", count));
            for (number, file) in received.into_iter().enumerate() {
                assert_eq!(std::fs::File::from(file).metadata().unwrap().len(), number as u64);
            }
            assert_eq!(right.receive::<String>().unwrap().0, "next");
        }
        let file = tempfile::tempfile().unwrap();
        let too_many = vec![file.as_fd(); DESCRIPTORS_MAX + 1];
        assert!(matches!(left.send(&(), &too_many), Err(ChannelError::TooLarge { .. })));
    }

    #[test]
    fn a_peer_that_sends_more_descriptors_than_expected_is_refused() {
        for (expected, sent) in [(3, 3), (3, 4), (3, 253), (3, 600), (0, 1)] {
            let (left, right) = Channel::pair().unwrap();
            let right = right.with_descriptors_max(expected);
            let file = tempfile::tempfile().unwrap();
            left.send(&"some", &vec![file.as_fd(); sent]).unwrap();
            match right.receive::<String>() {
                Ok((_, received)) => assert!(sent <= expected && received.len() == sent),
                Err(ChannelError::TooLarge { descriptors, .. }) => {
                    assert!(sent > expected && descriptors == sent);
                }
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn what_follows_a_message_without_its_descriptors_is_understood() {
        for announced in [1, 253, 600u32] {
            let (mut left, right) = UnixStream::pair().unwrap();
            let body = postcard::to_stdvec("lost").unwrap();
            left.write_all(&u32::try_from(body.len()).unwrap().to_le_bytes()).unwrap();
            left.write_all(&announced.to_le_bytes()).unwrap();
            left.write_all(&vec![0; announced.div_ceil(253) as usize - 1]).unwrap();
            left.write_all(&body).unwrap();
            Channel::new(left.try_clone().unwrap()).send(&"next", &[]).unwrap();
            let right = Channel::new(right);
            let error = right.receive::<String>().unwrap_err();
            assert!(matches!(error, ChannelError::LostDescriptors { received: 0, .. }), "{error}");
            assert_eq!(right.receive::<String>().unwrap().0, "next");
        }
    }

    #[test]
    fn half_a_message_is_the_last_one() {
        let (left, right) = Channel::pair().unwrap();
        left.socket().set_write_timeout(Some(std::time::Duration::from_millis(1))).unwrap();
        let error = left.send(&vec![1u8; 8 << 20], &[]).unwrap_err();
        assert!(matches!(error, ChannelError::Io(_)), "{error}");
        assert!(matches!(left.send(&"next", &[]), Err(ChannelError::Closed)));
        assert!(matches!(right.receive::<Vec<u8>>(), Err(ChannelError::Closed)));
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
