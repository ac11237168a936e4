//! Running commands in machines.

use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use coppice_agent::{
    Client as Agent, ClientError, Exec, ExecEvent, ExecInput, ExecOutput, RefusalKind, WindowSize,
};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;

use crate::cli;
use crate::client::{Client, unexpected};
use crate::rpc::{Reply, Request};

/// The interrupt that ends this process even if the machine does not react.
const IMPATIENT: u32 = 3;

/// A conversation with the agent of a machine that has its own identity.
pub(crate) fn agent(client: &Client, machine: &str) -> Result<Agent> {
    let request = Request::Agent { machine: machine.to_owned() };
    let (reply, mut received) = client.ask(request, &[], &mut |_| {})?;
    let Reply::Agent { generation } = reply else { return unexpected(&reply) };
    let stream = received.pop().context("the supervisor sent no stream")?;
    Ok(Agent::new(UnixStream::from(stream), generation)?)
}

/// `coppice exec`.
pub(super) fn exec(client: &Client, options: cli::Exec) -> Result<ExitCode> {
    let exec = Exec {
        argv: options.command.iter().map(|word| word.as_bytes().to_vec()).collect(),
        env: options.env.iter().map(|pair| variable(pair)).collect::<Result<_>>()?,
        cwd: options.workdir.map(String::into_bytes),
        tty: if options.tty { Some(window()) } else { None },
        stdin: options.interactive,
        detach: false,
    };
    let (input, output) = match agent(client, &options.machine)?.exec(exec) {
        Ok(halves) => halves,
        Err(error) => return refused(&error),
    };
    // Until here a signal ends this process, which is what it is for.
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH])?;
    let _raw = if options.tty { RawTerminal::enter()? } else { None };
    let ended = signals.handle();
    let to_signal = input.clone();
    let passing = std::thread::spawn(move || pass_signals(&mut signals, &to_signal));
    if options.interactive {
        // Blocks in a read for as long as the terminal is silent, so nobody
        // waits for it: the process ends with the command.
        std::thread::spawn(move || pass_input(&input));
    }
    let code = pass_output(output)?;
    ended.close();
    if passing.join().is_err() {
        bail!("passing signals failed");
    }
    Ok(ExitCode::from(code))
}

/// What a shell returns for a command that cannot be started.
fn refused(error: &ClientError) -> Result<ExitCode> {
    let code = match error {
        ClientError::Refused { kind: RefusalKind::CommandNotFound, .. } => 127,
        ClientError::Refused { kind: RefusalKind::CannotExecute, .. } => 126,
        _ => bail!("{error}"),
    };
    eprintln!("coppice: {error}");
    Ok(ExitCode::from(code))
}

fn variable(pair: &str) -> Result<(Vec<u8>, Vec<u8>)> {
    match pair.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => bail!("--env takes NAME=VALUE, not {pair:?}"),
    }
}

fn pass_signals(signals: &mut Signals, input: &ExecInput) {
    let mut asked_to_end = 0;
    for signal in signals.forever() {
        if [SIGINT, SIGTERM].contains(&signal) {
            asked_to_end += 1;
            if asked_to_end == IMPATIENT {
                eprintln!("coppice: the machine does not react: leaving it alone");
                std::process::exit(128 + signal);
            }
        }
        let sent = match signal {
            SIGWINCH => input.resize(window()),
            other => input.signal(other),
        };
        if sent.is_err() {
            // The command is over, or the machine: the output half says so.
            return;
        }
    }
}

fn pass_input(input: &ExecInput) {
    let mut stdin = std::io::stdin().lock();
    let mut buffer = vec![0; 16 << 10];
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                if input.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    // If the command is over, the output half says so.
    drop(input.close());
}

fn pass_output(mut output: ExecOutput) -> Result<u8> {
    let mut stdout = std::io::stdout().lock();
    let mut stderr = std::io::stderr().lock();
    loop {
        match output.next_event()? {
            ExecEvent::Stdout(bytes) => {
                stdout.write_all(bytes)?;
                stdout.flush()?;
            }
            ExecEvent::Stderr(bytes) => stderr.write_all(bytes)?,
            ExecEvent::Exited(status) => return Ok(status.shell_code()),
        }
    }
}

/// The size of this terminal, or the usual one.
fn window() -> WindowSize {
    match tcgetwinsize(std::io::stdout()) {
        Ok(size) => WindowSize { rows: size.ws_row, columns: size.ws_col },
        Err(_) => WindowSize { rows: 24, columns: 80 },
    }
}

/// Passes keys on as they are typed; gives the terminal back when dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before).is_err() {
            eprintln!("coppice: cannot give the terminal back; `reset` does");
        }
    }
}

/// A finished command.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: u8,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command that prints little, to its end.
pub(crate) fn capture(client: &Client, machine: &str, command: &[&str]) -> Result<Finished> {
    feed(client, machine, command, &[])
}

fn feed(client: &Client, machine: &str, command: &[&str], stdin: &[u8]) -> Result<Finished> {
    let argv = command.iter().map(|word| word.as_bytes().to_vec()).collect();
    let exec = Exec { argv, ..Exec::default() };
    let done = agent(client, machine)?.run(exec, stdin)?;
    Ok(Finished {
        code: done.status.shell_code(),
        stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
    })
}

/// Writes a small file in a machine.
pub(crate) fn send_file(client: &Client, machine: &str, bytes: &[u8], path: &str) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let name = std::path::Path::new(path).file_name().context("the path names no file")?;
    let local = folder.path().join(name);
    std::fs::write(&local, bytes).with_context(|| format!("cannot write {}", local.display()))?;
    agent(client, machine)?.put(&local, std::path::Path::new(path))?;
    Ok(())
}
