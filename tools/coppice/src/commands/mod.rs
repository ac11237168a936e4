//! The commands, one function each.

mod collect;
mod copy;
mod doctor;
pub(crate) mod exec;
mod lineage;
mod machines;
mod manual;
mod read;
mod rebuild;
mod store;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use coppice_runtime::sys::channel::Channel;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::cli::{Cli, Command, Serve};
use crate::client::Client;
use crate::output::Output;
use crate::rpc::Request;
use crate::supervisor::{self, paths::Paths};

/// Runs one command and says how it ended.
pub(crate) fn run(cli: Cli) -> Result<ExitCode> {
    match &cli.command {
        Command::InternalZygote => return internal(coppice_runtime::zygote_main),
        Command::InternalPager => return internal(page_server),
        Command::Completions { shell } => {
            manual::completions(*shell);
            return Ok(ExitCode::SUCCESS);
        }
        Command::Man { folder } => {
            manual::manual(folder)?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let folder = cli.store.clone().map_or_else(default_store, Ok)?;
    let out = Output { json: cli.json };
    if cli.read_only {
        return dispatch(&Client::looking(folder)?, cli.command, out);
    }
    if let Command::Serve(options) = &cli.command {
        return serve(folder, options);
    }
    if matches!(cli.command, Command::Doctor) {
        return doctor::doctor(&folder, out);
    }
    if matches!(cli.command, Command::RebuildIndex) {
        return rebuild::rebuild_index(&folder, out);
    }
    if let Command::Demo(options) = &cli.command {
        return crate::demo::run(options, cli.store, out);
    }
    dispatch(&Client::new(folder)?, cli.command, out)
}

fn dispatch(client: &Client, command: Command, out: Output) -> Result<ExitCode> {
    match command {
        Command::Import(options) => store::import(client, &options, out),
        Command::Export(options) => store::export(client, &options, out),
        Command::Read(options) => read::read(client, options),
        Command::Snapshots => store::snapshots(client, out),
        Command::Show { name, usage } => store::show(client, name, usage, out),
        Command::Diff { one, other, all } => lineage::diff(client, one, other, all, out),
        Command::Tree { usage } => lineage::tree(client, usage, out),
        Command::Tag { name, new } => store::tag(client, name, new, out),
        Command::Rmi { names } => store::rmi(client, names, out),
        Command::Stats { usage } => store::stats(client, usage, out),
        Command::Check(options) => return store::check(client, &options, out),
        Command::Gc(options) => collect::gc(client, &options, out),
        Command::Run(options) => machines::run(client, options, out),
        Command::Exec(options) => return exec::exec(client, options),
        Command::Cp { source, target } => copy::cp(client, &source, &target),
        Command::Snapshot { machine, name, cold } => {
            machines::snapshot(client, Request::Snapshot { machine, name, cold }, out)
        }
        Command::Fork(options) => machines::fork(client, options, out),
        Command::Ps => machines::ps(client, out),
        Command::Logs { machine, follow } => machines::logs(client, machine, follow),
        Command::Pause { machine, in_memory } => {
            machines::simple(client, Request::Pause { machine, in_memory }, out)
        }
        Command::Start { machine } => machines::start(client, machine, out),
        Command::Resume { machine } => machines::simple(client, Request::Resume { machine }, out),
        Command::Stop { machines, kill } => machines::stop(client, machines, kill, out),
        Command::Rm { machines, force } => machines::rm(client, machines, force, out),
        Command::DumpMemory { machine, file } => store::dump_memory(client, machine, &file, out),
        Command::Pools => machines::pools(client, out),
        Command::Serve(_)
        | Command::Demo(_)
        | Command::RebuildIndex
        | Command::Doctor
        | Command::Completions { .. }
        | Command::Man { .. }
        | Command::InternalZygote
        | Command::InternalPager => {
            anyhow::bail!("this command needs the store for itself: leave out --read-only")
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Becomes a process that the supervisor started, joined to it by the channel
/// on standard input.
fn internal(main: impl FnOnce(Channel) -> ExitCode) -> Result<ExitCode> {
    log_to_stderr();
    allow_many_descriptors();
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    Ok(main(Channel::new(UnixStream::from(socket)).trusting()))
}

/// Descriptors of a supervisor with ten thousand machines, as far as it may.
const DESCRIPTORS_WANTED: u64 = 1 << 18;

/// Every machine takes several descriptors in the supervisor and one in the
/// page server; the usual soft limit of 1,024 would end at some hundred, and a
/// usual hard limit, which only root may raise, at two thousand.
fn allow_many_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    let all = limit.maximum.map_or(DESCRIPTORS_WANTED, |maximum| maximum.max(DESCRIPTORS_WANTED));
    let more = Rlimit { current: Some(all), maximum: limit.maximum.map(|_| all) };
    if setrlimit(Resource::Nofile, more).is_ok() {
        return;
    }
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

fn page_server(channel: Channel) -> ExitCode {
    // It was started by a path that says nothing.
    if let Err(error) = rustix::thread::set_name(c"coppice") {
        tracing::debug!(%error, "no name for the page server");
    }
    match coppice_runtime::pager_main(channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("page server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr() {
    tracing_subscriber::fmt()
        .with_env_filter(log_filter())
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}

pub(crate) fn log_filter() -> tracing_subscriber::EnvFilter {
    tracing_subscriber::EnvFilter::try_from_env("COPPICE_LOG").unwrap_or_else(|_| "info".into())
}

fn serve(folder: PathBuf, options: &Serve) -> Result<ExitCode> {
    if options.stop {
        return stop_serving(folder);
    }
    allow_many_descriptors();
    let settings = (options.zstd_level, options.pool_memory);
    supervisor::serve(Paths::new(folder)?, options.background, settings)?;
    Ok(ExitCode::SUCCESS)
}

/// Asks a running supervisor to end and waits until its socket is gone.
fn stop_serving(folder: PathBuf) -> Result<ExitCode> {
    let client = Client::new(folder)?;
    if !client.end_supervisor()? {
        eprintln!("coppice: nothing serves {}", client.store().display());
    }
    Ok(ExitCode::SUCCESS)
}

fn default_store() -> Result<PathBuf> {
    let data = match std::env::var_os("XDG_DATA_HOME") {
        Some(data) if !data.is_empty() => PathBuf::from(data),
        _ => {
            let home = std::env::var_os("HOME")
                .context("neither --store, COPPICE_HOME nor HOME says where the store is")?;
            PathBuf::from(home).join(".local/share")
        }
    };
    Ok(data.join("coppice"))
}
