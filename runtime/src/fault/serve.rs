//! The page server's process.

use std::io;
use std::sync::Arc;

use super::engine::EngineLibrary;
use super::outbox::Outbox;
use super::server::{Server, Settings};
use super::source::Library;
use crate::protocol::PagerRequest;
use crate::sys::channel::{Channel, ChannelError};

/// Why the page server ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The supervisor cannot be understood.
    #[error("the page server lost its supervisor: {0}")]
    Channel(#[from] ChannelError),
    /// The kernel refused threads or descriptors.
    #[error("the page server cannot start: {0}")]
    Start(#[from] io::Error),
}

/// The life of the page server's process: serves pages of the engine's packs
/// until the supervisor closes its end.
pub fn pager_main(channel: Channel) -> Result<(), PagerError> {
    serve_pages(&channel, Arc::new(EngineLibrary::default()), &Settings::default())
}

/// Serves pages of any library until the other end is closed.
pub fn serve_pages(
    channel: &Channel,
    library: Arc<dyn Library>,
    settings: &Settings,
) -> Result<(), PagerError> {
    let (outbox, writer) = Outbox::start(channel.try_clone()?)?;
    let result = obey(channel, library, settings, outbox);
    // A panic of the writer has been reported where it happened.
    drop(writer.join());
    result
}

fn obey(
    channel: &Channel,
    library: Arc<dyn Library>,
    settings: &Settings,
    outbox: Outbox,
) -> Result<(), PagerError> {
    let mut server = Server::start(library, settings, outbox.clone())?;
    loop {
        match channel.receive::<PagerRequest>() {
            Ok((request, descriptors)) => match server.handle(request, descriptors) {
                Ok((reply, descriptors)) => outbox.reply(Ok(reply), descriptors),
                Err(error) => outbox.reply(Err(error.to_string()), Vec::new()),
            },
            // Too many are open here. Only this request fails.
            Err(error @ ChannelError::LostDescriptors { .. }) => {
                outbox.reply(Err(error.to_string()), Vec::new());
            }
            Err(ChannelError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
