//! `coppice`: capture running machines whole, regrow them as forks.

mod cable;
mod cli;
mod client;
mod commands;
mod demo;
mod host_memory;
mod output;
mod rpc;
mod supervisor;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

/// The exit code of wrong usage.
const USAGE: u8 = 2;

/// Wrong usage that only a command itself can see.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WrongUsage(pub(crate) &'static str);

impl std::fmt::Display for WrongUsage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for WrongUsage {}

/// Whoever read the output has seen enough, as `head` does.
fn is_closed_output(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<std::io::Error>();
    cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not mistakes. A closed terminal
            // cannot be told anything.
            drop(error.print());
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(USAGE),
            };
        }
    };
    match commands::run(cli) {
        Ok(code) => code,
        Err(error) if is_closed_output(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coppice: {}", output::one_line(&error));
            if error.is::<WrongUsage>() { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
        }
    }
}
