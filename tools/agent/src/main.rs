//! The guest agent's binary: the machine's first process, or a service.

use std::process::ExitCode;

use coppice_agent::guest::{run_as_init, run_as_service};

const USAGE: &str = "\
coppice-agent: answers the host of this virtual machine over vsock

  coppice-agent serve    as a service on any Linux system
  init=…/coppice-agent   as the machine's first process (kernel command line)";

fn main() -> ExitCode {
    let failure = if std::process::id() == 1 {
        run_as_init().err().map(|error| error.to_string())
    } else if std::env::args_os().nth(1).is_some_and(|argument| argument == "serve") {
        run_as_service().err().map(|error| error.to_string())
    } else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    if let Some(failure) = failure {
        eprintln!("coppice-agent: {failure}");
    }
    ExitCode::FAILURE
}
