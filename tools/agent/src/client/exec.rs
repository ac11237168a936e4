//! A program that runs in a machine, seen from the host.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Client, ClientError, receive, unexpected};
use crate::frame::encode;
use crate::protocol::{Exec, ExitStatus, MAX_DATA, Reply, Request, STDIN_WINDOW, WindowSize};

/// What a program did.
#[derive(Debug, PartialEq, Eq)]
pub enum ExecEvent<'a> {
    /// It wrote to standard output, or to its terminal.
    Stdout(&'a [u8]),
    /// It wrote to standard error.
    Stderr(&'a [u8]),
    /// It is over; nothing follows.
    Exited(ExitStatus),
}

/// A finished program and all it wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

/// Towards the program. Cheap to clone; may be used from any thread.
#[derive(Debug, Clone)]
pub struct ExecInput {
    shared: Arc<Shared>,
}

/// From the program.
#[derive(Debug)]
pub struct ExecOutput {
    client: Client,
    shared: Arc<Shared>,
    pid: u32,
}

#[derive(Debug)]
struct Shared {
    sender: Mutex<Sender>,
    credit: Mutex<Credit>,
    changed: Condvar,
}

#[derive(Debug)]
struct Sender {
    stream: UnixStream,
    scratch: Vec<u8>,
}

#[derive(Debug)]
struct Credit {
    bytes: usize,
    over: bool,
}

impl Client {
    /// Starts a program. Returns when it runs; a program that cannot be
    /// started is [`ClientError::Refused`].
    pub fn exec(mut self, exec: Exec) -> Result<(ExecInput, ExecOutput), ClientError> {
        self.send(&Request::Exec(exec), &[])?;
        let pid = match self.receive()? {
            (Reply::Started { pid }, _) => pid,
            (other, _) => return Err(unexpected("the start of the program", other)),
        };
        let stream = self.stream.try_clone().map_err(ClientError::Duplicate)?;
        let shared = Arc::new(Shared {
            sender: Mutex::new(Sender { stream, scratch: Vec::new() }),
            credit: Mutex::new(Credit { bytes: STDIN_WINDOW, over: false }),
            changed: Condvar::new(),
        });
        Ok((ExecInput { shared: Arc::clone(&shared) }, ExecOutput { client: self, shared, pid }))
    }

    /// Runs a program to its end with `stdin` as its standard input and keeps
    /// all it writes: for programs that write little.
    pub fn run(self, mut exec: Exec, stdin: &[u8]) -> Result<Captured, ClientError> {
        exec.stdin = !stdin.is_empty();
        let feeds = exec.stdin;
        let (input, mut output) = self.exec(exec)?;
        std::thread::scope(|scope| {
            if feeds {
                // A program may end without reading its input; what counts is
                // how it ends, which the other half reports.
                scope.spawn(move || input.write_all(stdin).and_then(|()| input.close()));
            }
            output.capture()
        })
    }
}

impl ExecInput {
    /// Sends standard input; waits while the program does not read. Ends early
    /// without an error if the program is over.
    pub fn write_all(&self, mut bytes: &[u8]) -> Result<(), ClientError> {
        while !bytes.is_empty() {
            let Some(granted) = self.take_credit(bytes.len().min(MAX_DATA)) else {
                return Ok(());
            };
            let (now, later) = bytes.split_at(granted);
            self.send(&Request::Stdin, now)?;
            bytes = later;
        }
        Ok(())
    }

    /// Ends standard input.
    pub fn close(&self) -> Result<(), ClientError> {
        self.send(&Request::StdinEof, &[])
    }

    /// Sends a signal, by number, to the program's process group.
    pub fn signal(&self, signal: i32) -> Result<(), ClientError> {
        self.send(&Request::Signal(signal), &[])
    }

    /// Tells the program that its terminal has a new size.
    pub fn resize(&self, size: WindowSize) -> Result<(), ClientError> {
        self.send(&Request::Resize(size), &[])
    }

    /// Waits until at least one byte may be sent; how many, up to `wanted`.
    fn take_credit(&self, wanted: usize) -> Option<usize> {
        let mut credit = lock(&self.shared.credit);
        while credit.bytes == 0 && !credit.over {
            credit = self.shared.changed.wait(credit).unwrap_or_else(PoisonError::into_inner);
        }
        if credit.over {
            return None;
        }
        let granted = wanted.min(credit.bytes);
        credit.bytes -= granted;
        Some(granted)
    }

    /// Sends unless the program is over: then there is nobody to tell.
    fn send(&self, request: &Request, payload: &[u8]) -> Result<(), ClientError> {
        let mut sender = lock(&self.shared.sender);
        if lock(&self.shared.credit).over {
            return Ok(());
        }
        let Sender { stream, scratch } = &mut *sender;
        scratch.clear();
        encode(request, payload, scratch)?;
        stream.write_all(scratch).map_err(ClientError::from_io)
    }
}

impl ExecOutput {
    /// The program's process id in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the program's next deed.
    pub fn next_event(&mut self) -> Result<ExecEvent<'_>, ClientError> {
        loop {
            let received = receive(&mut self.client.stream, &mut self.client.body);
            let reply = match received {
                Ok((reply, payload)) => (reply, payload.len()),
                Err(error) => {
                    self.shared.finish();
                    return Err(error);
                }
            };
            match reply {
                (Reply::StdinCredit(bytes), _) => self.shared.grant(bytes as usize),
                (Reply::Stdout, length) => return Ok(ExecEvent::Stdout(self.tail(length))),
                (Reply::Stderr, length) => return Ok(ExecEvent::Stderr(self.tail(length))),
                (Reply::Exited(status), _) => {
                    self.shared.finish();
                    return Ok(ExecEvent::Exited(status));
                }
                (other, _) => {
                    self.shared.finish();
                    return Err(unexpected("the program's output", other));
                }
            }
        }
    }

    /// Hands the connection back once the program has ended.
    pub fn into_client(self) -> Client {
        self.client
    }

    /// The last `length` bytes of the frame that was just read: its payload.
    fn tail(&self, length: usize) -> &[u8] {
        let body = &self.client.body;
        &body[body.len() - length..]
    }

    fn capture(&mut self) -> Result<Captured, ClientError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next_event()? {
                ExecEvent::Stdout(bytes) => stdout.extend_from_slice(bytes),
                ExecEvent::Stderr(bytes) => stderr.extend_from_slice(bytes),
                ExecEvent::Exited(status) => return Ok(Captured { status, stdout, stderr }),
            }
        }
    }
}

impl Shared {
    fn grant(&self, bytes: usize) {
        let mut credit = lock(&self.credit);
        credit.bytes = credit.bytes.saturating_add(bytes);
        self.changed.notify_all();
    }

    fn finish(&self) {
        lock(&self.credit).over = true;
        self.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
