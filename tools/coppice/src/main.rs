//! `coppice`: capture running machines whole, regrow them as forks.

mod cli;
mod client;
mod commands;
mod demo;
mod output;
mod rpc;
mod supervisor;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

/// Wrong usage.
const USAGE: u8 = 2;

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
            ExitCode::FAILURE
        }
    }
}
