//! Answers one connection after the other.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::children::Children;
use super::link::Link;
use super::renew::{Targets, renew};
use super::{copy, exec};
use crate::frame::FrameError;
use crate::protocol::{BOOT_GENERATION, Identity, RefusalKind, Reply, Request, VERSION};

/// What an agent is given.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where an identity goes.
    pub targets: Targets,
    /// Environment of every program it runs.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Directory in which programs start that name none.
    pub home: Vec<u8>,
}

/// The machine's agent; shared by the threads that serve its connections.
#[derive(Debug)]
pub struct Agent {
    pub(super) settings: Settings,
    pub(super) children: Children,
    /// The generation of the last renewal. Held while one is under way, so
    /// that no other connection is answered by a machine half renewed.
    generation: Mutex<u64>,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The host is done with it.
    Closed,
    /// The host wants the machine to end.
    Shutdown,
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The stream failed or carried something else than the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The first message was no greeting.
    #[error("the connection did not begin with a greeting")]
    NoGreeting,
    /// The host speaks another version; it was told so.
    #[error("the host speaks protocol version {0}, this agent speaks {VERSION}")]
    Version(u32),
}

impl Agent {
    /// An agent in a machine that was never renewed.
    pub fn new(settings: Settings) -> Self {
        Self { settings, children: Children::default(), generation: Mutex::new(BOOT_GENERATION) }
    }

    /// Serves a connection to its end.
    pub fn serve(&self, socket: OwnedFd) -> Result<Ended, AgentError> {
        let mut link = Link::new(socket);
        let generation = match greeting(&mut link) {
            Ok(generation) => generation,
            Err(AgentError::Frame(FrameError::Closed)) => return Ok(Ended::Closed),
            Err(error) => return Err(error),
        };
        loop {
            let request = match link.receive() {
                Ok((request, _payload)) => request,
                Err(FrameError::Closed) => return Ok(Ended::Closed),
                Err(error) => return Err(error.into()),
            };
            if self.answer(&mut link, generation, request)? == Ended::Shutdown {
                return Ok(Ended::Shutdown);
            }
        }
    }

    /// Carries out one operation; [`Ended::Closed`] to go on.
    fn answer(
        &self,
        link: &mut Link,
        generation: u64,
        request: Request,
    ) -> Result<Ended, FrameError> {
        match request {
            Request::Ping => {
                let generation = *self.generation();
                link.reply(&Reply::Pong { version: VERSION, generation }, &[])?;
            }
            Request::Renew(identity) => {
                let reply = self.renew(generation, &identity);
                link.reply(&reply, &[])?;
            }
            // What was on its way when a program or a copy ended.
            Request::Stdin
            | Request::StdinEof
            | Request::Signal(_)
            | Request::Resize(_)
            | Request::Entry(_)
            | Request::Data
            | Request::End => {}
            Request::Hello { .. } => {
                link.reply(&refused(RefusalKind::Invalid, "a second greeting"), &[])?;
            }
            operation => return self.operate(link, generation, operation),
        }
        Ok(Ended::Closed)
    }

    /// Carries out what only a renewed machine does.
    fn operate(
        &self,
        link: &mut Link,
        generation: u64,
        operation: Request,
    ) -> Result<Ended, FrameError> {
        let own = *self.generation();
        if own != generation {
            let message = format!(
                "the machine has generation {own}, not {generation}: renew it before anything else"
            );
            if matches!(operation, Request::Put { .. }) {
                return copy::discard(link, &refused(RefusalKind::NotRenewed, message));
            }
            link.reply(&refused(RefusalKind::NotRenewed, message), &[])?;
            return Ok(Ended::Closed);
        }
        match operation {
            Request::Exec(program) => exec::run(self, link, &program)?,
            Request::Put { path, name } => return copy::put(link, &path, &name),
            Request::Get { path } => copy::get(link, &path)?,
            Request::Shutdown => {
                link.reply(&Reply::ShuttingDown, &[])?;
                return Ok(Ended::Shutdown);
            }
            _ => link.reply(&refused(RefusalKind::Invalid, "not an operation"), &[])?,
        }
        Ok(Ended::Closed)
    }

    fn renew(&self, announced: u64, identity: &Identity) -> Reply {
        if announced != identity.generation {
            let message = "the greeting announced another generation than the identity has";
            return refused(RefusalKind::Invalid, message);
        }
        let mut generation = self.generation();
        match renew(&self.settings.targets, identity) {
            Ok(()) => {
                *generation = identity.generation;
                Reply::Renewed { generation: identity.generation }
            }
            Err(error) => refused(error.kind(), error.to_string()),
        }
    }

    fn generation(&self) -> MutexGuard<'_, u64> {
        self.generation.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the greeting; the generation that the host expects.
fn greeting(link: &mut Link) -> Result<u64, AgentError> {
    match link.receive()?.0 {
        Request::Hello { version: VERSION, generation } => Ok(generation),
        Request::Hello { version, .. } => {
            let error = AgentError::Version(version);
            link.reply(&refused(RefusalKind::Invalid, error.to_string()), &[])?;
            Err(error)
        }
        _ => Err(AgentError::NoGreeting),
    }
}

pub(super) fn refused(kind: RefusalKind, message: impl Into<String>) -> Reply {
    Reply::Refused { kind, message: message.into() }
}
