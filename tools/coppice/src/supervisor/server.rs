//! Accepting connections and answering requests, each on a thread of its own.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use coppice_runtime::sys::channel::{Channel, ChannelError};
use rustix::event::{PollFd, PollFlags, poll};

use super::machine::lock;
use super::{IDLE_LIMIT, Supervisor};
use crate::rpc::{Failure, Hello, Message, PROTOCOL, Progress, Reply, Request};

/// How often the loop looks whether it should end.
const TICK: Duration = Duration::from_millis(200);

/// How long a caller may take to say what it wants.
const HELLO_LIMIT: Duration = Duration::from_secs(30);

/// One of the requests that are being answered, until dropped: also by a panic,
/// which must not keep the supervisor from idling out.
struct Busy(Arc<AtomicU64>);

impl Busy {
    fn one_more(busy: &Arc<AtomicU64>) -> Self {
        busy.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(busy))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a request is answered with.
pub(super) type Answer = (Reply, Vec<OwnedFd>);

/// Accepts connections until it is time to end.
pub(crate) fn accept(
    supervisor: &Arc<Supervisor>,
    listener: &UnixListener,
    background: bool,
) -> Result<()> {
    listener.set_nonblocking(true)?;
    let busy = Arc::new(AtomicU64::new(0));
    while !supervisor.ending.load(Ordering::Acquire) {
        if background && is_idle(supervisor, &busy) {
            tracing::info!("nothing to do: ending");
            break;
        }
        wait(listener)?;
        match listener.accept() {
            Ok((socket, _)) => {
                if let Err(error) = answer_on_thread(supervisor, socket, &busy) {
                    tracing::warn!(%error, "cannot answer a caller");
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept a caller");
                // Out of descriptors, most likely: some come back.
                std::thread::sleep(TICK);
            }
        }
    }
    // A caller that connects from here on finds no socket and starts a new
    // supervisor, which waits for the store's lock.
    let removed = std::fs::remove_file(supervisor.paths.socket());
    supervisor.end_all();
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("cannot remove the socket")
        }
        _ => Ok(()),
    }
}

fn wait(listener: &UnixListener) -> Result<()> {
    let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
    let mut descriptors = [PollFd::new(listener, PollFlags::IN)];
    match poll(&mut descriptors, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn is_idle(supervisor: &Supervisor, busy: &AtomicU64) -> bool {
    let alive = supervisor.table.list().iter().any(|machine| machine.state().is_alive());
    let store_is_gone = !supervisor.paths.socket().exists();
    busy.load(Ordering::Acquire) == 0
        && (store_is_gone || (!alive && lock(&supervisor.last_request).elapsed() > IDLE_LIMIT))
}

fn answer_on_thread(
    supervisor: &Arc<Supervisor>,
    socket: UnixStream,
    busy: &Arc<AtomicU64>,
) -> Result<()> {
    // An accepted socket does not inherit the listener's mode everywhere.
    socket.set_nonblocking(false)?;
    let counted = Busy::one_more(busy);
    let supervisor = Arc::clone(supervisor);
    super::spawn("request", move || {
        let _counted = counted;
        if let Err(error) = converse(&supervisor, &Channel::new(socket)) {
            tracing::debug!(%error, "a caller left");
        }
        // The request may have been the last user of a layer.
        supervisor.pools.close_layers();
        *lock(&supervisor.last_request) = Instant::now();
    })
}

fn converse(supervisor: &Arc<Supervisor>, channel: &Channel) -> Result<(), ChannelError> {
    // A caller that says nothing must not keep a supervisor from idling out.
    channel.socket().set_read_timeout(Some(HELLO_LIMIT))?;
    let (hello, received) = channel.receive::<Hello>()?;
    let answer = if hello.protocol == PROTOCOL {
        channel.send(&Message::Accepted, &[])?;
        let mut report = |step: Progress| {
            // A caller that went away is noticed at the reply.
            drop(channel.send(&Message::Progress(step), &[]));
        };
        let caller_left = || super::piped::has_left(channel.socket());
        answer(supervisor, hello.request, received, (&caller_left, &mut report))
    } else {
        Err(anyhow::anyhow!(
            "the running supervisor is another version of coppice: end it with that version's `coppice serve --stop`"
        ))
    };
    match answer {
        Ok((reply, descriptors)) => {
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            match channel.send(&Message::Reply(Ok(reply)), &borrowed) {
                Err(error @ ChannelError::TooLarge { .. }) => {
                    let failure = Failure { message: error.to_string() };
                    channel.send(&Message::Reply(Err(failure)), &[])
                }
                sent => sent,
            }
        }
        Err(error) => {
            let failure = Failure { message: crate::output::one_line(&error) };
            channel.send(&Message::Reply(Err(failure)), &[])
        }
    }
}

pub(super) fn answer(
    supervisor: &Arc<Supervisor>,
    request: Request,
    received: Vec<OwnedFd>,
    (caller_left, report): (&dyn Fn() -> bool, &mut dyn FnMut(Progress)),
) -> Result<Answer> {
    let reply = match request {
        Request::Ping => Reply::Pong { pid: std::process::id(), protocol: PROTOCOL },
        Request::Import { name, stream, format } => {
            let files: Vec<File> = received.into_iter().map(File::from).collect();
            supervisor.import(&name, (stream, format), &files, caller_left, report)?
        }
        Request::Export { name, part, in_order } => {
            supervisor.export(&name, (part, in_order), &one_file(received)?, report)?
        }
        Request::Read { name, part, extents } => {
            supervisor.read(&name, part, &extents, &one_file(received)?)?
        }
        Request::Snapshots => Reply::Snapshots(supervisor.snapshots()?),
        Request::Show { name } => Reply::Shown(Box::new(supervisor.show(&name)?)),
        Request::Tag { name, new } => supervisor.tag(&name, &new)?,
        Request::RemoveSnapshot { name } => supervisor.remove_snapshot(&name)?,
        Request::Usage { name } => supervisor.usage(name.as_deref())?,
        Request::Diff { one, other } => supervisor.diff(&one, &other)?,
        Request::Lineage { usage } => supervisor.lineage(usage)?,
        Request::Stats => Reply::Stats(supervisor.stats()?),
        Request::Collect { dry_run, dead_percent_min } => {
            supervisor.collect(dry_run, dead_percent_min, report)?
        }
        Request::Repair => Reply::Checked(supervisor.repair(report)?),
        Request::Check(scope) => Reply::Checked(supervisor.check(scope, report)?),
        Request::Boot(boot) => Reply::Forked(supervisor.boot(&boot, one(received)?)?),
        Request::Fork(fork) => Reply::Forked(supervisor.fork(&fork, report)?),
        Request::Snapshot { machine, name, cold } => {
            let machine = supervisor.table.get(&machine)?;
            Reply::Captured(supervisor.snapshot(&machine, name.as_deref(), cold)?)
        }
        Request::Machines => Reply::Machines(supervisor.machine_lines()?),
        Request::Agent { machine } => {
            let (stream, generation) = supervisor.agent_stream(&machine)?;
            return Ok((Reply::Agent { generation }, vec![stream.into()]));
        }
        Request::Connect { machine, port } => return stream(supervisor.connect(&machine, port)?),
        Request::Logs { machine } => {
            return Ok((Reply::Stream, vec![supervisor.console(&machine)?.into()]));
        }
        Request::Pause { machine, in_memory } => supervisor.pause(&machine, in_memory)?,
        Request::Resume { machine } => supervisor.resume(&machine)?,
        Request::Start { machine } => Reply::Forked(supervisor.start_again(&machine)?),
        Request::Stop { machine, kill } => supervisor.stop(&machine, kill)?,
        Request::RemoveMachine { machine, force } => supervisor.remove_machine(&machine, force)?,
        Request::DumpMemory { machine } => {
            let machine = supervisor.table.get(&machine)?;
            let begun = Instant::now();
            let bytes = supervisor.dump_memory(&machine, &one_file(received)?)?;
            Reply::Exported { bytes, seconds: begun.elapsed().as_secs_f64() }
        }
        Request::Pools => Reply::Pools(supervisor.pool_lines()?),
        Request::Shutdown => {
            supervisor.ending.store(true, Ordering::Release);
            Reply::Done
        }
    };
    Ok((reply, Vec::new()))
}

fn stream(socket: UnixStream) -> Result<Answer> {
    Ok((Reply::Stream, vec![socket.into()]))
}

fn one(received: Vec<OwnedFd>) -> Result<OwnedFd> {
    let [only] = <[OwnedFd; 1]>::try_from(received)
        .map_err(|received| anyhow::anyhow!("expected one file, got {}", received.len()))?;
    Ok(only)
}

fn one_file(received: Vec<OwnedFd>) -> Result<File> {
    match one(received) {
        Ok(descriptor) => Ok(File::from(descriptor)),
        Err(error) => bail!(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_panics_counts_no_more() {
        let busy = Arc::new(AtomicU64::new(0));
        let counted = Busy::one_more(&busy);
        assert_eq!(busy.load(Ordering::Acquire), 1);
        let panicked = std::thread::spawn(move || {
            let _counted = counted;
            panic!("a request that fails on purpose");
        });
        assert!(panicked.join().is_err());
        assert_eq!(busy.load(Ordering::Acquire), 0);
    }
}
