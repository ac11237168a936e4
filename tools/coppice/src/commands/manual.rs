//! Shell completion and manual pages, made from the command line itself.

use std::path::Path;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;

/// Writes the completion script for a shell to standard output.
pub(super) fn completions(shell: Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "coppice", &mut std::io::stdout());
}

/// Writes `coppice.1` and a page for each command into a folder.
pub(super) fn manual(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
        .with_context(|| format!("cannot write manual pages into {}", folder.display()))
}
