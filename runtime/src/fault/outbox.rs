//! What the page server has to say, in order, written by one thread: a worker
//! that reports a loss never waits for the socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};

use crate::protocol::{PagerEvent, PagerMessage, PagerReply};
use crate::sys::channel::{Channel, ChannelError};

type Letter = (PagerMessage, Vec<OwnedFd>);

/// The sending end.
#[derive(Debug, Clone)]
pub(super) struct Outbox(Sender<Letter>);

impl Outbox {
    /// Starts the writing thread; it ends when all senders are gone or the
    /// other process is.
    pub(super) fn start(channel: Channel) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (sender, receiver) = unbounded::<Letter>();
        let write = move || {
            for (message, descriptors) in receiver {
                let sent = match (send(&channel, &message, &descriptors), &message) {
                    // Whoever waits for it must hear something.
                    (Err(error @ ChannelError::TooLarge { .. }), PagerMessage::Reply(_)) => {
                        let refusal = PagerMessage::Reply(Err(error.to_string()));
                        send(&channel, &refusal, &[])
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

    pub(super) fn reply(&self, reply: Result<PagerReply, String>, descriptors: Vec<OwnedFd>) {
        // Without a reader there is nobody to tell.
        drop(self.0.send((PagerMessage::Reply(reply), descriptors)));
    }

    pub(super) fn event(&self, event: PagerEvent) {
        drop(self.0.send((PagerMessage::Event(event), Vec::new())));
    }
}

fn send(
    channel: &Channel,
    message: &PagerMessage,
    descriptors: &[OwnedFd],
) -> Result<(), ChannelError> {
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    channel.send(message, &borrowed)
}
