//! The agent's end of one connection.
//!
//! Messages can be exchanged by waiting ([`Link::receive`], [`Link::reply`])
//! or, while a program runs, without ever blocking ([`Link::fill`],
//! [`Link::queue`], [`Link::flush_some`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags};

use crate::frame::{Assembler, FrameError, decode, encode};
use crate::protocol::{MAX_DATA, Reply, Request};

/// Room for one full data frame.
const READ_LEN: usize = MAX_DATA + 64;

#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    input: Assembler,
    output: Vec<u8>,
    sent: usize,
}

/// What [`Link::fill`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    Some,
    Nothing,
    Closed,
}

impl Link {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, input: Assembler::default(), output: Vec::new(), sent: 0 }
    }

    /// Waits for the next message.
    pub(super) fn receive(&mut self) -> Result<(Request, Vec<u8>), FrameError> {
        let mut payload = Vec::new();
        let request = self.receive_into(&mut payload)?;
        Ok((request, payload))
    }

    /// Waits for the next message; its payload replaces `payload`.
    pub(super) fn receive_into(&mut self, payload: &mut Vec<u8>) -> Result<Request, FrameError> {
        loop {
            if let Some(body) = self.input.next_body()? {
                let (request, rest) = decode(body)?;
                payload.clear();
                payload.extend_from_slice(rest);
                return Ok(request);
            }
            if self.read(RecvFlags::empty())? == Filled::Closed {
                return Err(FrameError::Closed);
            }
        }
    }

    /// The next message that has arrived whole.
    pub(super) fn next_arrived(&mut self) -> Result<Option<(Request, &[u8])>, FrameError> {
        self.input.next_body()?.map(decode).transpose()
    }

    /// Takes in what has arrived.
    pub(super) fn fill(&mut self) -> Result<Filled, FrameError> {
        self.read(RecvFlags::DONTWAIT)
    }

    fn read(&mut self, flags: RecvFlags) -> Result<Filled, FrameError> {
        let buffer = self.input.input();
        buffer.reserve(READ_LEN);
        let received =
            retry_on_intr(|| rustix::net::recv(&self.socket, spare_capacity(&mut *buffer), flags));
        match received {
            Ok((_, 0)) => Ok(Filled::Closed),
            Ok(_) => Ok(Filled::Some),
            Err(Errno::AGAIN) => Ok(Filled::Nothing),
            Err(errno) => Err(FrameError::Io(errno.into())),
        }
    }

    /// Sends a message and all that was queued before it.
    pub(super) fn reply(&mut self, reply: &Reply, payload: &[u8]) -> Result<(), FrameError> {
        self.queue(reply, payload)?;
        while !self.flush(SendFlags::empty())? {}
        Ok(())
    }

    /// Keeps a message to be sent later.
    pub(super) fn queue(&mut self, reply: &Reply, payload: &[u8]) -> Result<(), FrameError> {
        encode(reply, payload, &mut self.output)
    }

    /// Bytes that wait to be sent.
    pub(super) fn queued(&self) -> usize {
        self.output.len() - self.sent
    }

    /// Sends what the peer takes now.
    pub(super) fn flush_some(&mut self) -> Result<(), FrameError> {
        self.flush(SendFlags::DONTWAIT).map(|_all| ())
    }

    /// Whether everything is sent.
    fn flush(&mut self, flags: SendFlags) -> Result<bool, FrameError> {
        if self.queued() > 0 {
            let pending = &self.output[self.sent..];
            let flags = flags | SendFlags::NOSIGNAL;
            match retry_on_intr(|| rustix::net::send(&self.socket, pending, flags)) {
                Ok(count) => self.sent += count,
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(FrameError::Io(errno.into())),
            }
        }
        if self.queued() > 0 {
            return Ok(false);
        }
        self.output.clear();
        self.sent = 0;
        Ok(true)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
