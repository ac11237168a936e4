//! Talking to the process in the guest that keeps its state in memory.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::client::Client;
use crate::rpc::Request;

/// The vsock port on which the keeper listens.
pub(super) const PORT: u32 = 5000;

/// The keeper's program.
pub(super) const PROGRAM: &str = include_str!("keeper.py");

/// An answer that takes longer is a failure.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A conversation with the keeper of one machine.
#[derive(Debug)]
pub(super) struct Keeper {
    stream: BufReader<UnixStream>,
}

impl Keeper {
    /// Connects to a keeper that is known to listen.
    pub(super) fn connect(client: &Client, machine: &str) -> Result<Self> {
        let request = Request::Connect { machine: machine.to_owned(), port: PORT };
        let stream = client.stream(request)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Connects to a keeper that is about to listen.
    pub(super) fn wait(client: &Client, machine: &str, limit: Duration) -> Result<Self> {
        let begun = Instant::now();
        loop {
            let mut keeper = Self::connect(client, machine)?;
            match keeper.ask("count") {
                Ok(_) => return Ok(keeper),
                Err(error) if begun.elapsed() > limit => {
                    return Err(error).context("the process in the guest does not listen");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    /// One line in, one line out.
    pub(super) fn ask(&mut self, line: &str) -> Result<String> {
        let stream = self.stream.get_mut();
        stream.write_all(line.as_bytes())?;
        stream.write_all(b"\n")?;
        let mut answer = String::new();
        if self.stream.read_line(&mut answer)? == 0 {
            bail!("the process in the guest closed the connection at {line:?}");
        }
        Ok(answer.trim_end().to_owned())
    }
}
