//! Runs one program for one connection.
//!
//! A single loop serves all of its streams, so nothing waits for anything:
//!
//! ```text
//! host ── Stdin (by credit) ──> stdin buffer ──> program
//! host <── output buffer <── stdout, stderr ──── program
//! ```
//!
//! Both buffers are bounded: the first by the credit that the host has, the
//! second because output is only read while little of it waits to be sent.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionbio, ioctl_fionread, retry_on_intr};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::agent::{Agent, refused};
use super::children::Child;
use super::link::{Filled, Link};
use super::spawn::{Prepared, SpawnError, Stdio};
use crate::frame::FrameError;
use crate::protocol::{Exec, ExitStatus, MAX_DATA, Reply, Request, STDIN_WINDOW, WindowSize};

/// Output is not read while more than this waits to be sent.
const MAX_QUEUED: usize = MAX_DATA;

/// What a terminal takes as the end of its input (control-D).
const TERMINAL_EOF: u8 = 4;

/// Runs a program to its end.
pub(super) fn run(agent: &Agent, link: &mut Link, exec: &Exec) -> Result<(), FrameError> {
    match start(agent, exec) {
        Ok(started) => {
            link.queue(&Reply::Started { pid: started.child.pid() }, &[])?;
            Session::new(started, exec, link).run()
        }
        Err(error) => link.reply(&refused(error.kind(), error.to_string()), &[]),
    }
}

/// The agent's ends of a running program.
struct Started<'a> {
    child: Child<'a>,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

fn start<'a>(agent: &'a Agent, exec: &Exec) -> Result<Started<'a>, SpawnError> {
    let prepared = Prepared::new(exec, &agent.settings.environment, &agent.settings.home)?;
    match exec.tty {
        Some(size) => start_on_terminal(agent, &prepared, size, exec.stdin),
        None => start_on_pipes(agent, &prepared, exec.stdin),
    }
}

fn start_on_pipes<'a>(
    agent: &'a Agent,
    prepared: &Prepared,
    stdin: bool,
) -> Result<Started<'a>, SpawnError> {
    let input = if stdin { Some(pipe_with(PipeFlags::CLOEXEC)?) } else { None };
    let (stdout, their_stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, their_stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    let (their_stdin, stdin) = input.unzip();
    if let Some(stdin) = &stdin {
        ioctl_fionbio(stdin, true)?;
    }
    let stdio =
        Stdio::Pipes { stdin: their_stdin.as_ref(), stdout: &their_stdout, stderr: &their_stderr };
    let child = agent.children.adopt(|| prepared.start(&stdio))?;
    Ok(Started { child, stdin, stdout: Some(stdout), stderr: Some(stderr) })
}

fn start_on_terminal<'a>(
    agent: &'a Agent,
    prepared: &Prepared,
    size: WindowSize,
    stdin: bool,
) -> Result<Started<'a>, SpawnError> {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&terminal)?;
    unlockpt(&terminal)?;
    let path: CString = ptsname(&terminal, Vec::new())?;
    tcsetwinsize(&terminal, winsize(size))?;
    ioctl_fionbio(&terminal, true)?;
    let input = if stdin { Some(rustix::io::fcntl_dupfd_cloexec(&terminal, 3)?) } else { None };
    let child = agent.children.adopt(|| prepared.start(&Stdio::Terminal(&path)))?;
    Ok(Started { child, stdin: input, stdout: Some(terminal), stderr: None })
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// A running program and its connection.
struct Session<'a> {
    link: &'a mut Link,
    connected: bool,
    detach: bool,
    terminal: bool,
    child: Child<'a>,
    stdin: Option<OwnedFd>,
    stdin_buffer: Vec<u8>,
    stdin_ended: bool,
    stdout: Output,
    stderr: Output,
    buffer: Vec<u8>,
}

/// One stream from the program.
struct Output {
    fd: Option<OwnedFd>,
    /// Bytes still to be read once the program has ended: what it had written
    /// by then. Others may hold the stream open for ever.
    rest: Option<u64>,
}

/// What to look at next, in the order in which it is polled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Link,
    Stdin,
    Stdout,
    Stderr,
    Child,
}

impl<'a> Session<'a> {
    fn new(started: Started<'a>, exec: &Exec, link: &'a mut Link) -> Self {
        Self {
            link,
            connected: true,
            detach: exec.detach,
            terminal: exec.tty.is_some(),
            child: started.child,
            stdin: started.stdin,
            stdin_buffer: Vec::new(),
            stdin_ended: false,
            stdout: Output { fd: started.stdout, rest: None },
            stderr: Output { fd: started.stderr, rest: None },
            buffer: Vec::new(),
        }
    }

    fn run(mut self) -> Result<(), FrameError> {
        // The host's first input, if any, came along with the request.
        let mut broken = self.take_messages().and_then(|()| self.link.flush_some()).err();
        loop {
            if let Some(error) = broken.take() {
                self.disconnect(error)?;
            }
            if let Some(status) = self.finished() {
                return self.report(status);
            }
            broken = self.step().err();
        }
    }

    /// The end of the program, once all its output is queued.
    fn finished(&self) -> Option<ExitStatus> {
        let drained = self.stdout.fd.is_none() && self.stderr.fd.is_none();
        self.child.status().filter(|_| drained)
    }

    fn report(self, status: ExitStatus) -> Result<(), FrameError> {
        if !self.connected {
            return Err(FrameError::Closed);
        }
        self.link.reply(&Reply::Exited(status), &[])
    }

    /// The host is gone, or talks nonsense: without a reason to go on the
    /// program is killed by dropping it.
    fn disconnect(&mut self, error: FrameError) -> Result<(), FrameError> {
        if !self.detach {
            return Err(error);
        }
        self.connected = false;
        self.stdin = None;
        Ok(())
    }

    /// Waits until something can go on, and lets it.
    fn step(&mut self) -> Result<(), FrameError> {
        let ready = self.wait()?;
        for (source, flags) in ready.into_iter().flatten() {
            match source {
                Source::Link => {
                    if flags.contains(PollFlags::OUT) {
                        self.link.flush_some()?;
                    }
                    if flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                        self.take_input()?;
                    }
                }
                Source::Stdin => self.feed()?,
                Source::Stdout => self.forward(Source::Stdout)?,
                Source::Stderr => self.forward(Source::Stderr)?,
                Source::Child => self.child_ended()?,
            }
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<[Option<(Source, PollFlags)>; 5], FrameError> {
        let takes_output = self.link.queued() < MAX_QUEUED || !self.connected;
        let ended = self.child.status().is_some();
        let mut link_flags = PollFlags::IN;
        if self.link.queued() > 0 {
            link_flags |= PollFlags::OUT;
        }
        let stdin = self.stdin.as_ref().filter(|_| !self.stdin_buffer.is_empty());
        let stdout = self.stdout.fd.as_ref().filter(|_| takes_output);
        let stderr = self.stderr.fd.as_ref().filter(|_| takes_output);
        let wanted = [
            self.connected.then(|| (Source::Link, self.link.as_fd(), link_flags)),
            stdin.map(|fd| (Source::Stdin, fd.as_fd(), PollFlags::OUT)),
            stdout.map(|fd| (Source::Stdout, fd.as_fd(), PollFlags::IN)),
            stderr.map(|fd| (Source::Stderr, fd.as_fd(), PollFlags::IN)),
            (!ended).then(|| (Source::Child, self.child.as_fd(), PollFlags::IN)),
        ];
        let mut polled: Vec<PollFd<'_>> =
            wanted.iter().flatten().map(|(_, fd, flags)| PollFd::new(fd, *flags)).collect();
        retry_on_intr(|| poll(&mut polled, None)).map_err(failed)?;
        let mut results = polled.iter().map(PollFd::revents);
        Ok(wanted.map(|entry| {
            let (source, ..) = entry?;
            let flags = results.next()?;
            (!flags.is_empty()).then_some((source, flags))
        }))
    }

    fn take_input(&mut self) -> Result<(), FrameError> {
        match self.link.fill()? {
            Filled::Closed => Err(FrameError::Closed),
            Filled::Nothing => Ok(()),
            Filled::Some => self.take_messages(),
        }
    }

    fn take_messages(&mut self) -> Result<(), FrameError> {
        while let Some((request, payload)) = self.link.next_arrived()? {
            match request {
                Request::Stdin => {
                    if self.stdin.is_some() && !self.stdin_ended {
                        self.stdin_buffer.extend_from_slice(payload);
                    }
                    if self.stdin_buffer.len() > STDIN_WINDOW {
                        return Err(FrameError::TooLarge(self.stdin_buffer.len()));
                    }
                }
                Request::StdinEof => self.stdin_ended = true,
                // A group that has just ended needs no signal, and an unknown
                // number has no effect.
                Request::Signal(signal) => {
                    let _ended = self.child.signal(signal);
                }
                Request::Resize(size) => self.resize(size),
                other => return Err(out_of_place(&other)),
            }
        }
        self.feed()
    }

    fn resize(&self, size: WindowSize) {
        if let Some(terminal) = self.stdout.fd.as_ref().filter(|_| self.terminal) {
            // A terminal that has just been hung up has no size to set.
            let _gone = tcsetwinsize(terminal, winsize(size));
        }
    }

    /// Writes to the program's standard input what it takes.
    fn feed(&mut self) -> Result<(), FrameError> {
        if self.stdin_ended && self.terminal && self.stdin.is_some() {
            self.stdin_buffer.push(TERMINAL_EOF);
            self.stdin_ended = false;
        }
        let Some(stdin) = &self.stdin else {
            self.stdin_buffer.clear();
            return Ok(());
        };
        if !self.stdin_buffer.is_empty() {
            match retry_on_intr(|| rustix::io::write(stdin, &self.stdin_buffer)) {
                Ok(count) => {
                    self.stdin_buffer.drain(..count);
                    let count = u32::try_from(count).unwrap_or(u32::MAX);
                    self.link.queue(&Reply::StdinCredit(count), &[])?;
                }
                Err(Errno::AGAIN) => {}
                // The program does not read any more, which is its own affair.
                Err(_) => self.close_stdin()?,
            }
        }
        if self.stdin_ended && self.stdin_buffer.is_empty() {
            self.stdin = None;
        }
        self.link.flush_some()
    }

    /// Input goes nowhere from now on; the host may send it all the same.
    fn close_stdin(&mut self) -> Result<(), FrameError> {
        self.stdin = None;
        self.stdin_buffer.clear();
        self.link.queue(&Reply::StdinCredit(u32::MAX), &[])
    }

    /// Moves some of the program's output towards the host.
    fn forward(&mut self, source: Source) -> Result<(), FrameError> {
        let (output, reply) = match source {
            Source::Stderr => (&mut self.stderr, Reply::Stderr),
            _ => (&mut self.stdout, Reply::Stdout),
        };
        let Some(fd) = &output.fd else { return Ok(()) };
        self.buffer.clear();
        self.buffer.reserve_exact(MAX_DATA);
        let buffer = &mut self.buffer;
        let over = match retry_on_intr(|| rustix::io::read(fd, spare_capacity(buffer))) {
            Ok(count) => output.took(count),
            Err(Errno::AGAIN) => false,
            // A terminal whose other side is closed says so by an error.
            Err(_) => true,
        };
        if over {
            output.fd = None;
        }
        if self.connected && !self.buffer.is_empty() {
            self.link.queue(&reply, &self.buffer)?;
            self.link.flush_some()?;
        }
        Ok(())
    }

    fn child_ended(&mut self) -> Result<(), FrameError> {
        self.child.collect().map_err(failed)?;
        self.stdin = None;
        // A session leader's end hangs its terminal up, so that stream ends by
        // itself after its last byte.
        if !self.terminal {
            self.stdout.stop_after_present();
            self.stderr.stop_after_present();
        }
        Ok(())
    }
}

impl Output {
    /// Accounts for bytes that were read; whether the stream is over.
    fn took(&mut self, count: usize) -> bool {
        if let Some(rest) = &mut self.rest {
            *rest = rest.saturating_sub(count as u64);
        }
        count == 0 || self.rest == Some(0)
    }

    fn stop_after_present(&mut self) {
        let Some(fd) = &self.fd else { return };
        let rest = ioctl_fionread(fd).unwrap_or(0);
        self.rest = Some(rest);
        if rest == 0 {
            self.fd = None;
        }
    }
}

fn out_of_place(request: &Request) -> FrameError {
    let message = format!("{request:?} while a program runs");
    FrameError::Io(io::Error::new(io::ErrorKind::InvalidData, message))
}

fn failed(errno: Errno) -> FrameError {
    FrameError::Io(errno.into())
}
