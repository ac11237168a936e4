//! Starting a process that is joined to this one by a channel on its standard
//! input, so that the end of either is seen by the other as end of file.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::peer::PeerError;
use crate::sys::channel::Channel;

/// The program that becomes a machine's process or the page server.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl Program {
    /// Starts the program with its end of a channel as standard input and
    /// everything it prints in `log`.
    pub fn start(&self, process: &str, log: &File) -> Result<(Child, Channel), PeerError> {
        let spawn = |source| PeerError::Spawn { process: process.to_owned(), source };
        let (ours, theirs) = Channel::pair()
            .map_err(|source| PeerError::Channel { process: process.to_owned(), source })?;
        let child = Command::new(&self.path)
            .args(&self.arguments)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs.into_socket())))
            .stdout(log.try_clone().map_err(spawn)?)
            .stderr(log.try_clone().map_err(spawn)?)
            .spawn()
            .map_err(spawn)?;
        Ok((child, ours))
    }
}
