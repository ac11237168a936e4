//! Copies of trees, the agent's side.

use super::agent::{Ended, refused};
use super::link::Link;
use crate::frame::FrameError;
use crate::protocol::{Reply, Request};
use crate::tree::{Modes, Outgoing, Receiver, TreeError, send, to_path, top_name};

/// Receives a tree. [`Ended::Closed`] to go on with the connection.
pub(super) fn put(link: &mut Link, path: &[u8], name: &[u8]) -> Result<Ended, FrameError> {
    let mut receiver = match Receiver::new(to_path(path), name, Modes::All) {
        Ok(receiver) => receiver,
        Err(error) => return discard(link, &refusal(&error)),
    };
    let mut payload = Vec::new();
    loop {
        let done = match link.receive_into(&mut payload)? {
            Request::Entry(entry) => receiver.entry(&entry),
            Request::Data => receiver.data(&payload),
            Request::End => {
                let reply = receiver.finish().map_or_else(|error| refusal(&error), Reply::Copied);
                link.reply(&reply, &[])?;
                return Ok(Ended::Closed);
            }
            _ => Err(TreeError::OutOfOrder("another message inside a tree")),
        };
        if let Err(error) = done {
            return discard(link, &refusal(&error));
        }
    }
}

/// Refuses a tree and throws away what is on its way, so that the host is
/// never stuck sending it.
pub(super) fn discard(link: &mut Link, refusal: &Reply) -> Result<Ended, FrameError> {
    link.reply(refusal, &[])?;
    let mut payload = Vec::new();
    while link.receive_into(&mut payload)? != Request::End {}
    Ok(Ended::Closed)
}

/// Sends a tree.
pub(super) fn get(link: &mut Link, path: &[u8]) -> Result<(), FrameError> {
    let top = to_path(path);
    let sent = top_name(top).map_err(Stopped::Tree).and_then(|name| {
        link.reply(&Reply::Top { name }, &[])?;
        send(top, &mut |outgoing| {
            match outgoing {
                Outgoing::Entry(entry) => link.reply(&Reply::Entry(entry), &[])?,
                Outgoing::Data(bytes) => link.reply(&Reply::Data, bytes)?,
            }
            Ok(())
        })
    });
    match sent {
        Ok(report) => link.reply(&Reply::Copied(report), &[]),
        Err(Stopped::Tree(error)) => link.reply(&refusal(&error), &[]),
        Err(Stopped::Link(error)) => Err(error),
    }
}

fn refusal(error: &TreeError) -> Reply {
    refused(error.kind(), error.to_string())
}

enum Stopped {
    Tree(TreeError),
    Link(FrameError),
}

impl From<TreeError> for Stopped {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}

impl From<FrameError> for Stopped {
    fn from(error: FrameError) -> Self {
        Self::Link(error)
    }
}
