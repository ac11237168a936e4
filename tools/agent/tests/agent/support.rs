//! A "machine" whose agent runs on a thread of the test.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use coppice_agent::guest::{Agent, Settings, Targets};
use coppice_agent::{Client, ClientError, Exec, RefusalKind};

pub(crate) struct Machine {
    agent: Arc<Agent>,
    dir: tempfile::TempDir,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let path = std::env::var("PATH").unwrap();
        let environment =
            vec![(b"PATH".to_vec(), path.into_bytes()), (b"BASE".to_vec(), b"base".to_vec())];
        let targets = Targets { root: dir.path().to_path_buf(), kernel: false };
        let settings = Settings { targets, environment, home: b"/".to_vec() };
        Self { agent: Arc::new(Agent::new(settings)), dir }
    }

    /// A directory that goes when the machine does.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = Arc::clone(&self.agent);
        // How a connection ends is checked from the host's side.
        thread::spawn(move || drop(agent.serve(theirs.into())));
        ours
    }

    pub(crate) fn client(&self) -> Client {
        self.client_of(0)
    }

    pub(crate) fn client_of(&self, generation: u64) -> Client {
        Client::new(self.connect(), generation).unwrap()
    }
}

pub(crate) fn command(argv: &[&str]) -> Exec {
    Exec { argv: argv.iter().map(|arg| arg.as_bytes().to_vec()).collect(), ..Exec::default() }
}

pub(crate) fn shell(script: &str) -> Exec {
    command(&["sh", "-c", script])
}

pub(crate) fn make_fifo(path: &Path) {
    let status = std::process::Command::new("mkfifo").arg(path).status().unwrap();
    assert!(status.success());
}

/// Makes a FIFO and opens it for reading, which waits for a writer.
pub(crate) fn fifo(path: &Path) -> JoinHandle<File> {
    make_fifo(path);
    let path: PathBuf = path.to_path_buf();
    thread::spawn(move || File::open(path).unwrap())
}

/// The refusal that an operation must have met.
pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (RefusalKind, String) {
    match result {
        Err(ClientError::Refused { kind, message }) => (kind, message),
        other => panic!("not a refusal: {other:?}"),
    }
}
