//! What the page server has to say, in order, written by one thread: a worker
//! that reports a loss never waits for the socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};

use crate::protocol::{PagerEvent, PagerMessage, PagerReply};
use crate::sys::channel::{Channel, ChannelError};

struct Letter {
    message: PagerMessage,
    descriptors: Vec<OwnedFd>,
    /// What is done once it is written.
    then: Option<Box<dyn FnOnce() + Send>>,
}

/// The sending end.
#[derive(Debug, Clone)]
pub(super) struct Outbox(Sender<Letter>);

impl Outbox {
    /// Starts the writing thread; it ends when all senders are gone or the
    /// other process is.
    pub(super) fn start(channel: Channel) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (sender, receiver) = unbounded::<Letter>();
        let write = move || {
            for Letter { message, descriptors, then } in receiver {
                let sent = match (send(&channel, &message, &descriptors), &message) {
                    // Whoever waits for it must hear something.
                    (Err(error @ ChannelError::TooLarge { .. }), PagerMessage::Reply(_)) => {
                        let refusal = PagerMessage::Reply(Err(error.to_string()));
                        send(&channel, &refusal, &[])
                    }
                    (sent, _) => sent,
                };
                if let Some(then) = then {
                    then();
                }
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
        let message = PagerMessage::Reply(reply);
        drop(self.0.send(Letter { message, descriptors, then: None }));
    }

    pub(super) fn event(&self, event: PagerEvent) {
        self.send_event(event, None);
    }

    /// The same; `then` is called when the event is written, so that it is heard
    /// even if this process ends then.
    pub(super) fn event_then(&self, event: PagerEvent, then: impl FnOnce() + Send + 'static) {
        self.send_event(event, Some(Box::new(then)));
    }

    fn send_event(&self, event: PagerEvent, then: Option<Box<dyn FnOnce() + Send>>) {
        let message = PagerMessage::Event(event);
        drop(self.0.send(Letter { message, descriptors: Vec::new(), then }));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::PoolId;

    #[test]
    fn what_follows_an_event_waits_until_it_is_written() {
        let (near, far) = Channel::pair().unwrap();
        let (outbox, writer) = Outbox::start(near).unwrap();
        let (done, heard) = crossbeam_channel::bounded(1);
        // More than a socket holds.
        let error = Some("x".repeat(8 << 20));
        let event = PagerEvent::LayerDone { layer: PoolId(1), error };
        outbox.event_then(event.clone(), move || done.send(()).unwrap());
        assert!(heard.try_recv().is_err());
        assert_eq!(far.receive::<PagerMessage>().unwrap().0, PagerMessage::Event(event));
        heard.recv().unwrap();
        drop(outbox);
        writer.join().unwrap();
    }
}
