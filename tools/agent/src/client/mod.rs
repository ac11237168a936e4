//! The host's side of the protocol.
//!
//! A [`Client`] owns one connection. Short operations are methods that wait;
//! a program that runs ([`Client::exec`]) is split into an input and an output
//! half that may live on different threads.

mod copy;
mod exec;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

pub use exec::{Captured, ExecEvent, ExecInput, ExecOutput};

use crate::frame::{FrameError, decode, encode, read_frame};
use crate::protocol::{Identity, RefusalKind, Reply, Request, VERSION};
use crate::tree::TreeError;

/// Why an operation in a machine failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection failed or the peer is no agent.
    #[error("the machine's agent: {0}")]
    Connection(#[from] FrameError),
    /// The agent did not carry out the operation.
    #[error("{message}")]
    Refused {
        /// What can be done about it.
        kind: RefusalKind,
        /// The agent's own words.
        message: String,
    },
    /// The agent answered something that does not belong here.
    #[error("the machine's agent sent {got} where {expected} was due")]
    Unexpected {
        /// What the protocol allows here.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// A file on the host's side could not be used.
    #[error(transparent)]
    Local(#[from] TreeError),
    /// The connection could not be duplicated.
    #[error("cannot duplicate the machine's connection: {0}")]
    Duplicate(#[source] std::io::Error),
}

impl ClientError {
    fn from_io(error: std::io::Error) -> Self {
        Self::Connection(FrameError::Io(error))
    }
}

/// One connection to a machine's agent.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Encoded messages that are not yet sent; begins with the greeting.
    outgoing: Vec<u8>,
    body: Vec<u8>,
}

impl Client {
    /// Takes over a connection to [`crate::AGENT_PORT`] of the machine whose
    /// generation is `generation`. Says nothing until the first operation.
    pub fn new(stream: UnixStream, generation: u64) -> Result<Self, ClientError> {
        let mut outgoing = Vec::new();
        encode(&Request::Hello { version: VERSION, generation }, &[], &mut outgoing)?;
        Ok(Self { stream, outgoing, body: Vec::new() })
    }

    /// Asks whether the agent is there; the generation of its last renewal.
    pub fn ping(&mut self) -> Result<u64, ClientError> {
        self.send(&Request::Ping, &[])?;
        match self.receive()? {
            (Reply::Pong { generation, .. }, _) => Ok(generation),
            (other, _) => Err(unexpected("a pong", other)),
        }
    }

    /// Gives the machine its identity. Every other operation is refused until
    /// this was done with the connection's generation.
    pub fn renew(&mut self, identity: &Identity) -> Result<(), ClientError> {
        self.send(&Request::Renew(identity.clone()), &[])?;
        match self.receive()? {
            (Reply::Renewed { generation }, _) if generation == identity.generation => Ok(()),
            (other, _) => Err(unexpected("the end of the renewal", other)),
        }
    }

    /// Ends the machine in an orderly way. The machine itself ends a moment
    /// after this returns.
    pub fn shutdown(mut self) -> Result<(), ClientError> {
        self.send(&Request::Shutdown, &[])?;
        match self.receive()? {
            (Reply::ShuttingDown, _) => Ok(()),
            (other, _) => Err(unexpected("the end of the machine", other)),
        }
    }

    /// Sends a message, after the greeting if it is the first.
    fn send(&mut self, request: &Request, payload: &[u8]) -> Result<(), ClientError> {
        encode(request, payload, &mut self.outgoing)?;
        let sent = self.stream.write_all(&self.outgoing);
        self.outgoing.clear();
        sent.map_err(ClientError::from_io)
    }

    /// Waits for a message that is no refusal.
    fn receive(&mut self) -> Result<(Reply, &[u8]), ClientError> {
        receive(&mut self.stream, &mut self.body)
    }
}

fn receive<'a>(
    stream: &mut impl Read,
    body: &'a mut Vec<u8>,
) -> Result<(Reply, &'a [u8]), ClientError> {
    read_frame(stream, body)?;
    match decode(body)? {
        (Reply::Refused { kind, message }, _) => Err(ClientError::Refused { kind, message }),
        other => Ok(other),
    }
}

fn unexpected(expected: &'static str, got: Reply) -> ClientError {
    ClientError::Unexpected { expected, got: format!("{got:?}") }
}
