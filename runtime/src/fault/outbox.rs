//! What the page server has to say, in order, written by one thread: a worker
//! that reports a loss never waits for the socket.

use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};

use crate::protocol::{PagerEvent, PagerMessage, PagerReply};
use crate::sys::channel::{Channel, ChannelError};

type Letter = (PagerMessage, Option<OwnedFd>);

/// The sending end.
#[derive(Debug, Clone)]
pub(super) struct Outbox(Sender<Letter>);

impl Outbox {
    /// Starts the writing thread; it ends when all senders are gone or the
    /// other process is.
    pub(super) fn start(channel: Channel) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (sender, receiver) = unbounded::<Letter>();
        let write = move || {
            for (message, descriptor) in receiver {
                let sent = match (send(&channel, &message, descriptor.as_ref()), &message) {
                    // Whoever waits for it must hear something.
                    (Err(error @ ChannelError::TooLarge { .. }), PagerMessage::Reply(_)) => {
                        let refusal = PagerMessage::Reply(Err(error.to_string()));
                        send(&channel, &refusal, None)
                    }
                    (sent, _) => sent,
                };
                if let Err(ChannelError::Closed | ChannelError::Io(_)) = sent {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("outbox".to_owned()).spawn(write)?;
        Ok((Self(sender), thread))
    }

    pub(super) fn reply(&self, reply: Result<PagerReply, String>, descriptor: Option<OwnedFd>) {
        // Without a reader there is nobody to tell.
        drop(self.0.send((PagerMessage::Reply(reply), descriptor)));
    }

    pub(super) fn event(&self, event: PagerEvent) {
        drop(self.0.send((PagerMessage::Event(event), None)));
    }
}

fn send(
    channel: &Channel,
    message: &PagerMessage,
    descriptor: Option<&OwnedFd>,
) -> Result<(), ChannelError> {
    match descriptor {
        Some(descriptor) => channel.send(message, &[descriptor.as_fd()]),
        None => channel.send(message, &[]),
    }
}
