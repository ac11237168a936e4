//! The command line's side of the supervisor's socket, and starting a
//! supervisor when none runs.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use coppice_runtime::sys::channel::{Channel, ChannelError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::rpc::{Failure, Hello, Message, PROTOCOL, Progress, Reply, Request};
use crate::supervisor::paths::Paths;
use crate::supervisor::view::View;

/// How long a new supervisor may take to open its store. Opening republishes
/// what a crash left behind, so a large store can take a while.
const START_LIMIT: Duration = Duration::from_secs(120);

/// How long a supervisor may take to end its machines.
const END_LIMIT_SECONDS: i64 = 120;

/// Talks to the supervisor of one store.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    paths: Paths,
    /// Answers instead of a supervisor.
    view: Option<Arc<View>>,
}

impl Client {
    /// A client for the store in `store`.
    pub(crate) fn new(store: PathBuf) -> Result<Self> {
        Ok(Self { paths: Paths::new(store)?, view: None })
    }

    /// A client that looks at the store by itself, and owns nothing.
    pub(crate) fn looking(store: PathBuf) -> Result<Self> {
        let paths = Paths::new(store)?;
        let view = View::open(paths.clone())?;
        Ok(Self { paths, view: Some(Arc::new(view)) })
    }

    /// The store's folder.
    pub(crate) fn store(&self) -> &Path {
        self.paths.store()
    }

    /// Asks, and waits for the answer; `progress` sees what comes before it.
    pub(crate) fn ask(
        &self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Reply, Vec<OwnedFd>)> {
        if let Some(view) = &self.view {
            let files = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
            return view.answer(request, files.collect::<Result<_, _>>()?, progress);
        }
        let begun = Instant::now();
        loop {
            let channel = self.connect()?;
            match converse(&channel, &request, descriptors, progress) {
                // The one that listened was just ending.
                Err(Unanswered::Unread) if begun.elapsed() < START_LIMIT => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                answer => return Ok(answer?),
            }
        }
    }

    /// Asks for something that needs no files and shows no progress.
    pub(crate) fn call(&self, request: Request) -> Result<Reply> {
        Ok(self.ask(request, &[], &mut |_| {})?.0)
    }

    /// Asks for a stream.
    pub(crate) fn stream(&self, request: Request) -> Result<UnixStream> {
        match self.ask(request, &[], &mut |_| {})? {
            (Reply::Stream, mut received) if received.len() == 1 => {
                let stream = received.pop().context("the supervisor sent no stream")?;
                Ok(UnixStream::from(stream))
            }
            (other, _) => unexpected(&other),
        }
    }

    /// Asks only if a supervisor is there already.
    pub(crate) fn ask_running(&self, request: Request) -> Result<Option<Reply>> {
        let Ok(socket) = UnixStream::connect(self.paths.socket()) else { return Ok(None) };
        match converse(&channel_of(socket), &request, &[], &mut |_| {}) {
            Ok((reply, _)) => Ok(Some(reply)),
            Err(Unanswered::Unread) => Ok(None),
            Err(other) => Err(other.into()),
        }
    }

    fn connect(&self) -> Result<Channel> {
        if let Ok(socket) = UnixStream::connect(self.paths.socket()) {
            return Ok(channel_of(socket));
        }
        self.start()
    }

    /// Starts a supervisor and waits until it listens.
    fn start(&self) -> Result<Channel> {
        let startup_errors = tempfile()?;
        let program = std::env::current_exe().context("cannot find the coppice program itself")?;
        let mut child = Command::new(program)
            .arg("--store")
            .arg(self.paths.store())
            .args(["serve", "--background"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(startup_errors.try_clone()?)
            .spawn()
            .context("cannot start the supervisor")?;
        let started = Instant::now();
        loop {
            if let Ok(socket) = UnixStream::connect(self.paths.socket()) {
                return Ok(channel_of(socket));
            }
            if let Some(status) = child.try_wait()? {
                // It may have lost a race against another one, which listens.
                if let Ok(socket) = UnixStream::connect(self.paths.socket()) {
                    return Ok(channel_of(socket));
                }
                bail!("{}", startup_failure(startup_errors, status)?);
            }
            if started.elapsed() > START_LIMIT {
                bail!(
                    "the supervisor of {} does not answer; see {}",
                    self.paths.store().display(),
                    self.paths.supervisor_log().display()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The supervisor is this user's own: it answers at any length.
fn channel_of(socket: UnixStream) -> Channel {
    Channel::new(socket).trusting()
}

fn tempfile() -> Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    Ok(File::from(rustix::fs::memfd_create("coppice-start", flags)?))
}

fn startup_failure(mut errors: File, status: std::process::ExitStatus) -> Result<String> {
    use std::io::{Read, Seek};
    errors.rewind()?;
    let mut text = String::new();
    errors.take(64 << 10).read_to_string(&mut text)?;
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    let last = last.map(|line| line.trim_start_matches("coppice: ").to_owned());
    Ok(last.unwrap_or_else(|| format!("the supervisor ended at once ({status})")))
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
enum Unanswered {
    #[error("the supervisor ended before it read the request; run the command again")]
    Unread,
    #[error(
        "the supervisor ended before it answered; what was committed is safe, run the command again"
    )]
    Gone,
    #[error(transparent)]
    Channel(ChannelError),
    #[error(transparent)]
    Refused(#[from] Failure),
}

fn converse(
    channel: &Channel,
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
    progress: &mut dyn FnMut(Progress),
) -> Result<(Reply, Vec<OwnedFd>), Unanswered> {
    let mut accepted = false;
    let failed = |error: ChannelError, accepted: bool| match error {
        ChannelError::Closed if accepted => Unanswered::Gone,
        ChannelError::Closed => Unanswered::Unread,
        error => Unanswered::Channel(error),
    };
    let hello = Hello { protocol: PROTOCOL, request: request.clone() };
    channel.send(&hello, descriptors).map_err(|error| failed(error, false))?;
    loop {
        let (message, received) =
            channel.receive::<Message>().map_err(|error| failed(error, accepted))?;
        match message {
            Message::Accepted => accepted = true,
            Message::Progress(step) => progress(step),
            Message::Reply(Ok(reply)) => return Ok((reply, received)),
            Message::Reply(Err(failure)) => return Err(failure.into()),
        }
    }
}

/// The error for an answer of the wrong kind.
pub(crate) fn unexpected<T>(reply: &Reply) -> Result<T> {
    bail!("the supervisor gave an answer that does not fit the question: {reply:?}")
}

/// Borrows a file as the one descriptor of a request.
pub(crate) fn with_file(file: &File) -> [BorrowedFd<'_>; 1] {
    [file.as_fd()]
}

impl Client {
    /// Ends a running supervisor and waits until it has let go of the store;
    /// says whether there was one.
    pub(crate) fn end_supervisor(&self) -> Result<bool> {
        let Some(Reply::Pong { pid, .. }) = self.ask_running(Request::Ping)? else {
            return Ok(false);
        };
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.context("the supervisor has an impossible process id")?;
        // Becomes readable when the process ends, reaped or not.
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        self.ask_running(Request::Shutdown)?;
        let limit = Timespec { tv_sec: END_LIMIT_SECONDS, tv_nsec: 0 };
        let mut descriptors = [PollFd::new(&process, PollFlags::IN)];
        if poll(&mut descriptors, Some(&limit))? == 0 {
            bail!("the supervisor of {} does not end", self.store().display());
        }
        Ok(true)
    }
}
