//! The process from which machines' processes are forked.
//!
//! It has one thread, has opened the devices that a machine needs, and has
//! left the host's files and network behind. Each process that it forks makes
//! the parts that no configuration changes, gives up every privilege, and
//! waits to be told which machine it is. A fork costs a fraction of starting
//! a program, and its memory is shared with the zygote until it is written.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use rustix::process::{PidfdFlags, pidfd_open, setsid};

use super::kit::Kit;
use super::server;
use super::sources::Sources;
use crate::jail;
use crate::protocol::{ZygoteMessage, ZygoteReply, ZygoteRequest};
use crate::sys::channel::{Channel, ChannelError};
use crate::sys::process::{Forked, fork, let_children_go};

/// Forks machines' processes until the supervisor goes away. Answers
/// [`ZygoteRequest`] with [`ZygoteMessage`]. The calling process must have
/// one thread.
pub fn zygote_main(channel: Channel) -> ExitCode {
    let sources = match prepare() {
        Ok(sources) => sources,
        Err(error) => {
            tracing::error!("zygote: {error}");
            return ExitCode::FAILURE;
        }
    };
    loop {
        match channel.receive::<ZygoteRequest>() {
            Ok((ZygoteRequest::Spawn, descriptors)) => match spawn(descriptors) {
                Ok(Spawned::Here(machine)) => {
                    drop(channel);
                    return become_machine(machine, sources);
                }
                Ok(Spawned::There(pid, descriptor)) => {
                    let reply = ZygoteMessage::Reply(Ok(ZygoteReply::Spawned { pid }));
                    if channel.send(&reply, &[descriptor.as_fd()]).is_err() {
                        return ExitCode::SUCCESS;
                    }
                }
                Err(reason) => {
                    if channel.send(&ZygoteMessage::Reply(Err(reason)), &[]).is_err() {
                        return ExitCode::SUCCESS;
                    }
                }
            },
            Err(ChannelError::Closed) => return ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!("zygote: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
}

fn prepare() -> std::io::Result<Sources> {
    // Keys typed at the supervisor's terminal are not for machines.
    if setsid().is_err() {
        tracing::debug!("already the leader of a session");
    }
    let_children_go()?;
    let sources = Sources::open()?.with_cpus();
    if let Err(error) = jail::empty_root() {
        tracing::warn!("machines see the host's files and network names: {error}");
    }
    jail::forgo_capabilities();
    Ok(sources)
}

enum Spawned {
    /// This is the new process; its channel.
    Here(Channel),
    /// This is the zygote; the new process.
    There(u32, OwnedFd),
}

fn spawn(descriptors: Vec<OwnedFd>) -> Result<Spawned, String> {
    let [socket] = <[OwnedFd; 1]>::try_from(descriptors)
        .map_err(|all| format!("Spawn came with {} descriptors, not one", all.len()))?;
    match fork().map_err(|error| format!("cannot fork a machine's process: {error}"))? {
        Forked::Child => Ok(Spawned::Here(Channel::new(UnixStream::from(socket)).trusting())),
        Forked::Parent(pid) => {
            // Its children are not waited for, so the id stays the child's
            // only until it ends; if it has ended already, that is said.
            let descriptor = pidfd_open(pid, PidfdFlags::empty())
                .map_err(|errno| format!("a machine's process ended at once: {errno}"))?;
            let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
            Ok(Spawned::There(pid, descriptor))
        }
    }
}

fn become_machine(channel: Channel, sources: Sources) -> ExitCode {
    if let Err(errno) = rustix::thread::set_name(c"coppice-vmm") {
        tracing::debug!("cannot set the process's name: {errno}");
    }
    let kit = Kit::new(&sources);
    drop::<Sources>(sources);
    // The zygote's channel is the standard input that it was started with.
    if let Err(error) =
        forget_standard_input().and_then(|()| jail::enter().map_err(std::io::Error::other))
    {
        tracing::error!("machine process: {error}");
        return ExitCode::FAILURE;
    }
    server::vmm_with(channel, kit)
}

fn forget_standard_input() -> std::io::Result<()> {
    let (reader, _writer) = std::io::pipe()?;
    let nothing = File::from(OwnedFd::from(reader));
    Ok(rustix::stdio::dup2_stdin(&nothing)?)
}
