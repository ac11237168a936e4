//! Requests and replies over a [`Channel`], with events in between.
//!
//! Requests are answered in order, one reply each; a reader thread sorts what
//! arrives into replies and events. When the process behind the channel ends,
//! every waiting and later request gets [`PeerError::Gone`]: nobody hangs.

use std::marker::PhantomData;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::protocol::{
    PagerEvent, PagerMessage, PagerReply, VmmEvent, VmmMessage, VmmReply, ZygoteEvent,
    ZygoteMessage, ZygoteReply,
};
use crate::sys::channel::{BODY_MAX, Channel, ChannelError};

/// Descriptors that come with one answer: a machine's process and the page
/// server send three at most. More than it needs of this process's a peer that is
/// not to be trusted must not take.
const DESCRIPTORS_MAX: usize = 3;

/// Why a request to another process failed.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The process is no longer there.
    #[error("{process} has ended")]
    Gone {
        /// What it was.
        process: String,
    },
    /// The process answered that it could not.
    #[error("{process}: {reason}")]
    Refused {
        /// What it was.
        process: String,
        /// In its own words.
        reason: String,
    },
    /// The process answered something that does not fit the question.
    #[error("{process} answered out of turn")]
    OutOfTurn {
        /// What it was.
        process: String,
    },
    /// The process said of itself what cannot be, and was ended.
    #[error("{process} said what cannot be: {what}")]
    Implausible {
        /// What it was.
        process: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The process could not be started.
    #[error("cannot start {process}")]
    Spawn {
        /// What it was to be.
        process: String,
        /// Why.
        source: std::io::Error,
    },
    /// The channel failed.
    #[error("{process}: {source}")]
    Channel {
        /// What it was.
        process: String,
        /// How.
        source: ChannelError,
    },
}

/// A message from a server, sorted.
pub enum Incoming<R, E> {
    /// The answer to the oldest unanswered request.
    Reply(Result<R, String>),
    /// Something else.
    Event(E),
}

/// What a server may send.
pub trait ServerMessage: DeserializeOwned + Send + 'static {
    /// Its answers.
    type Reply: Send + 'static;
    /// Its news.
    type Event: Send + 'static;
    /// Tells answers from news.
    fn sort(self) -> Incoming<Self::Reply, Self::Event>;
}

impl ServerMessage for VmmMessage {
    type Reply = VmmReply;
    type Event = VmmEvent;
    fn sort(self) -> Incoming<VmmReply, VmmEvent> {
        match self {
            Self::Reply(reply) => Incoming::Reply(reply),
            Self::Event(event) => Incoming::Event(event),
        }
    }
}

impl ServerMessage for PagerMessage {
    type Reply = PagerReply;
    type Event = PagerEvent;
    fn sort(self) -> Incoming<PagerReply, PagerEvent> {
        match self {
            Self::Reply(reply) => Incoming::Reply(reply),
            Self::Event(event) => Incoming::Event(event),
        }
    }
}

impl ServerMessage for ZygoteMessage {
    type Reply = ZygoteReply;
    type Event = ZygoteEvent;
    fn sort(self) -> Incoming<ZygoteReply, ZygoteEvent> {
        match self {
            Self::Reply(reply) => Incoming::Reply(reply),
        }
    }
}

/// News about a process.
#[derive(Debug)]
pub enum News<E> {
    /// It said something by itself.
    Event(E),
    /// Its channel closed: it has ended, or is about to.
    Closed,
}

type Answer<R> = (Result<R, String>, Vec<OwnedFd>);

/// A connection to a server process.
#[derive(Debug)]
pub struct Peer<Q, M: ServerMessage> {
    process: String,
    /// Held for a whole request, so that replies cannot be mixed up.
    turn: Mutex<Arc<Channel>>,
    answers: Receiver<Answer<M::Reply>>,
    /// The longest answer that is taken.
    body_max: Arc<AtomicUsize>,
    requests: PhantomData<fn(Q)>,
}

impl<Q: Serialize, M: ServerMessage> Peer<Q, M> {
    /// Starts listening. `news` runs on the reader thread: it must not make
    /// requests to this peer.
    pub fn new(
        process: String,
        channel: Channel,
        news: impl FnMut(News<M::Event>) + Send + 'static,
    ) -> Result<Self, PeerError> {
        // One descriptor for both directions: there are thousands of peers.
        let channel = Arc::new(channel.with_descriptors_max(DESCRIPTORS_MAX));
        let listen = Arc::clone(&channel);
        // One request waits at a time: a server that says more than it was asked
        // for is not listened to.
        let (sender, answers) = bounded(1);
        let body_max = Arc::new(AtomicUsize::new(BODY_MAX));
        let limit = Arc::clone(&body_max);
        std::thread::Builder::new()
            .name(format!("{process} reader"))
            .stack_size(256 << 10)
            .spawn({
                let process = process.clone();
                move || read_all::<M>(&process, &listen, (&sender, &limit), news)
            })
            .map_err(|source| PeerError::Spawn { process: process.clone(), source })?;
        Ok(Self { process, turn: Mutex::new(channel), answers, body_max, requests: PhantomData })
    }

    /// Takes answers up to this length in bytes from now on.
    pub fn expect_bodies(&self, body_max: usize) {
        self.body_max.store(body_max, Ordering::Relaxed);
    }

    /// Asks, and waits for the answer.
    pub fn call(
        &self,
        request: &Q,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(M::Reply, Vec<OwnedFd>), PeerError> {
        let channel = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        channel.send(request, descriptors).map_err(|source| self.failed(source))?;
        let (reply, received) = self.answers.recv().map_err(|_| self.gone())?;
        let reply = reply.map_err(|reason| self.refused(reason))?;
        Ok((reply, received))
    }

    /// The error for an answer of the wrong kind.
    pub fn out_of_turn(&self) -> PeerError {
        PeerError::OutOfTurn { process: self.process.clone() }
    }

    /// The error of a process that says what cannot be.
    pub(super) fn implausible(&self, what: &'static str) -> PeerError {
        PeerError::Implausible { process: self.process.clone(), what }
    }

    /// The error of a process that says by itself that it could not.
    pub(super) fn refused(&self, reason: String) -> PeerError {
        PeerError::Refused { process: self.process.clone(), reason }
    }

    /// The error of a process that is no longer there.
    pub(super) fn gone(&self) -> PeerError {
        PeerError::Gone { process: self.process.clone() }
    }

    fn failed(&self, source: ChannelError) -> PeerError {
        let process = self.process.clone();
        match source {
            ChannelError::Closed => PeerError::Gone { process },
            source => PeerError::Channel { process, source },
        }
    }
}

fn read_all<M: ServerMessage>(
    process: &str,
    channel: &Channel,
    (answers, body_max): (&Sender<Answer<M::Reply>>, &AtomicUsize),
    mut news: impl FnMut(News<M::Event>),
) {
    let next = || channel.receive_up_to::<M>(body_max.load(Ordering::Relaxed));
    loop {
        match next().map(|(message, received)| (message.sort(), received)) {
            Ok((Incoming::Reply(reply), received)) => {
                if answers.try_send((reply, received)).is_err() {
                    break;
                }
            }
            Ok((Incoming::Event(event), _)) => news(News::Event(event)),
            Err(ChannelError::Closed) => break,
            Err(error) => {
                tracing::error!(process, %error, "cannot be understood");
                break;
            }
        }
    }
    news(News::Closed);
}
