//! `cargo xtask`: everything that a checkout of Coppice can be asked to do.
//!
//! Long work says all the time what it is doing and for how long. What is
//! expensive to make (the guest, RocksDB) is made once and cached by content
//! outside the checkout. Results go to stdout, all else to stderr.

mod cache;
mod cargo;
mod checkout;
mod ci;
mod fuzz;
mod guest;
mod peers;
mod process;
mod progress;
mod python;
mod setup;
mod story;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::checkout::Checkout;
use crate::guest::Flavour;

/// Builds, shows, tests and checks Coppice.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Installs the Debian packages that building needs.
    Setup,
    /// Sets up, builds, makes the guest and tells the whole story on this host.
    Demo {
        /// Arguments of `coppice demo`, such as `--forks 500 --json`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
    /// Runs all tests, those that need a machine too.
    Test {
        /// Also the tests that take long.
        #[arg(long)]
        long: bool,
    },
    /// Fuzzes every decoder for a bounded time.
    Fuzz {
        /// Two minutes for each instead of two seconds.
        #[arg(long)]
        long: bool,
    },
    /// Measures the mechanisms and prints JSON.
    Bench {
        /// Arguments of the bench.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
    /// Measures Coppice beside restic, borg, casync and rustic on the same
    /// files, and prints JSON.
    BenchPeers(peers::Options),
    /// Puts what `bench-peers` printed into our pages: plots and tables.
    Plots(peers::publish::Options),
    /// Reads blocks of a file, for `bench-peers`.
    #[command(hide = true)]
    ReadBlocks {
        file: std::path::PathBuf,
        #[arg(required = true)]
        extents: Vec<String>,
    },
    /// Makes the guest's kernel and root disk, and prints where they are.
    Guest(GuestOptions),
    /// Checks the rules that no compiler checks: layers, safety comments, links.
    Tidy,
    /// What every change must pass.
    Ci,
}

#[derive(Debug, Args)]
struct GuestOptions {
    /// The kernel to build; without it, the one that suits this host.
    #[arg(long, value_enum)]
    flavour: Option<Flavour>,
    /// One JSON document instead of lines.
    #[arg(long)]
    json: bool,
    /// Make the root disk twice, from the first package on, and compare.
    #[arg(long)]
    verify: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    if let Command::ReadBlocks { file, extents } = &command {
        peers::blocks::read(file, extents)?;
        return Ok(ExitCode::SUCCESS);
    }
    let checkout = Checkout::find()?;
    match command {
        Command::Setup => setup::run()?,
        Command::Demo { arguments } => return story::demo(&checkout, &arguments),
        Command::Test { long } => {
            setup::run()?;
            story::test(&checkout, long)?;
        }
        Command::Fuzz { long } => fuzz::run(&checkout, long)?,
        Command::Bench { arguments } => return story::bench(&checkout, &arguments),
        Command::BenchPeers(options) => {
            setup::run()?;
            peers::run(&checkout, &options)?;
        }
        Command::Plots(options) => peers::publish::run(&checkout, &options)?,
        Command::ReadBlocks { .. } => unreachable!("it was read above"),
        Command::Guest(options) => make_guest(&checkout, &options)?,
        Command::Tidy => tidy::run(&checkout)?,
        Command::Ci => ci::run(&checkout)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn make_guest(checkout: &Checkout, options: &GuestOptions) -> Result<()> {
    if options.verify {
        return guest::verify(checkout);
    }
    let made = guest::make(checkout, options.flavour)?;
    if options.json {
        println!("{}", serde_json::to_string(&made)?);
    } else {
        println!("kernel={}\ndisk={}", made.kernel.display(), made.disk.display());
    }
    Ok(())
}
