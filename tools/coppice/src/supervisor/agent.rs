//! Reaching the agent in a guest, never before the guest has its own identity.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use coppice_agent::{
    AGENT_PORT, Client, ClientError, Exec, ExecEvent, ExitStatus, Identity, MIN_ENTROPY,
};

use super::capture::alive;
use super::deadline::in_time;
use super::machine::{Live, Machine, State, lock};
use super::{Supervisor, clock, net};

/// How long a guest may take until its agent listens: it may still boot.
const AGENT_LIMIT: Duration = Duration::from_secs(180);

/// How long the agent may take to answer once it was reached.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// How long the agent may take to hear that the guest should shut down.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// How far behind a guest's clock may be set, and how often to try for it.
const CLOCK_ERROR: Duration = Duration::from_millis(100);
const CLOCK_TRIES: usize = 4;

/// How long to wait before the next try.
const RETRY: Duration = Duration::from_millis(50);

impl Supervisor {
    /// A stream to a machine's agent, which has renewed, with the generation
    /// that the agent must hear.
    pub(crate) fn agent_stream(&self, name: &str) -> Result<(UnixStream, u64)> {
        let machine = self.table.get(name)?;
        let generation = renew(&machine)?;
        Ok((alive(&machine)?.vmm.connect(AGENT_PORT)?, generation))
    }

    /// Asks the guest to shut down and waits until it has.
    pub(crate) fn shut_down(&self, machine: &Machine, live: &Live, limit: Duration) -> bool {
        let asked = ask_to_shut_down(live, machine);
        if let Err(error) = asked {
            tracing::warn!(machine = machine.name, %error, "the guest does not shut down");
            return false;
        }
        let begun = Instant::now();
        while machine.state().is_alive() && begun.elapsed() < limit {
            std::thread::sleep(RETRY);
        }
        !machine.state().is_alive()
    }
}

/// Makes sure that a machine has fresh entropy, the right time and a name
/// of its own; returns its generation.
pub(crate) fn renew(machine: &Machine) -> Result<u64> {
    let mut renewed = lock(&machine.identity.renewed);
    let wanted = machine.identity.wanted.load(Ordering::Acquire);
    refuse_paused(machine)?;
    if *renewed == wanted {
        return Ok(wanted);
    }
    let begun = Instant::now();
    let live = loop {
        let live = alive(machine)?;
        refuse_paused(machine)?;
        match renew_once(&live, machine, wanted, ANSWER_LIMIT) {
            Ok(()) => break live,
            Err(error @ ClientError::Refused { .. }) => return Err(error.into()),
            Err(error) if begun.elapsed() > AGENT_LIMIT => {
                return Err(error).with_context(|| {
                    format!(
                        "no agent answers in {}: is coppice-agent on its disk? `coppice logs {}` shows its console",
                        machine.name, machine.name
                    )
                });
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    };
    if let Err(error) = net::plug(&live.nets) {
        // The machine goes on without; that must not keep anyone from it.
        tracing::warn!(machine = machine.name, %error, "no network");
    }
    *renewed = wanted;
    Ok(wanted)
}

/// Starts a renewal, because a machine on a network cannot wait until somebody
/// talks to its agent.
pub(super) fn plug_when_renewed(machine: &Arc<Machine>, live: &Live) -> Result<()> {
    if live.nets.is_empty() {
        return Ok(());
    }
    let machine = Arc::clone(machine);
    super::spawn("renew", move || {
        if let Err(error) = renew(&machine) {
            tracing::warn!(machine = machine.name, %error, "no network: its address is not renewed");
        }
    })
}

/// Nobody in a paused machine can answer.
fn refuse_paused(machine: &Machine) -> Result<()> {
    if machine.state() == State::Paused {
        bail!("{} is paused: `coppice resume {}` first", machine.name, machine.name);
    }
    Ok(())
}

fn renew_once(
    live: &Live,
    machine: &Machine,
    generation: u64,
    limit: Duration,
) -> Result<(), ClientError> {
    let mut agent = Client::new(reach(live, limit)?, generation)?;
    let ethernet = live.nets.iter().map(|net| net.mac).collect();
    let mut identity = identity(machine, generation, ethernet)?;
    for _ in 0..CLOCK_TRIES {
        identity.realtime_ns = clock::realtime_ns();
        let sent = Instant::now();
        agent.renew(&identity)?;
        // The guest's clock is behind by at most what the round trip took. A
        // guest that just continued has pages to fetch, so the first one can
        // take long.
        if sent.elapsed() < CLOCK_ERROR {
            break;
        }
    }
    Ok(())
}

/// Has the guest flush its page cache; `false` if its agent does not answer, or
/// the guest has no such program.
pub(super) fn flush(machine: &Machine, live: &Live) -> bool {
    let asked = ask_to_flush(machine, live);
    if let Err(error) = &asked {
        tracing::warn!(machine = machine.name, %error, "the guest does not flush");
    }
    asked.is_ok_and(|status| status == ExitStatus::Code(0))
}

fn ask_to_flush(machine: &Machine, live: &Live) -> Result<ExitStatus> {
    let generation = renewed_soon(live, machine)?;
    let stream = reach(live, ANSWER_LIMIT)?;
    let ours = stream.try_clone()?;
    let end = || drop(ours.shutdown(std::net::Shutdown::Both));
    in_time(ANSWER_LIMIT, end, || {
        let agent = Client::new(stream, generation)?;
        let sync = Exec { argv: vec![b"sync".to_vec()], ..Exec::default() };
        let (_input, mut output) = agent.exec(sync)?;
        loop {
            // Whatever it says is not kept: it may never end.
            if let ExecEvent::Exited(status) = output.next_event()? {
                return Ok(status);
            }
        }
    })
}

fn ask_to_shut_down(live: &Live, machine: &Machine) -> Result<()> {
    let generation = renewed_soon(live, machine)?;
    Ok(Client::new(reach(live, SHUTDOWN_LIMIT)?, generation)?.shutdown()?)
}

/// The agent listens only to callers with its generation, so a guest that
/// nobody has talked to yet renews first. One that does not answer is not
/// waited for.
fn renewed_soon(live: &Live, machine: &Machine) -> Result<u64> {
    let begun = Instant::now();
    let mut renewed = loop {
        match machine.identity.renewed.try_lock() {
            Ok(renewed) => break renewed,
            // Whoever holds it waits for an agent that may not answer.
            Err(_) if begun.elapsed() > SHUTDOWN_LIMIT => bail!("its agent does not answer"),
            Err(_) => std::thread::sleep(RETRY),
        }
    };
    let wanted = machine.identity.wanted.load(Ordering::Acquire);
    if *renewed != wanted {
        renew_once(live, machine, wanted, SHUTDOWN_LIMIT)?;
        *renewed = wanted;
    }
    Ok(wanted)
}

fn reach(live: &Live, limit: Duration) -> Result<UnixStream, ClientError> {
    let failed = |error: std::io::Error| ClientError::Connection(error.into());
    let stream =
        live.vmm.connect(AGENT_PORT).map_err(|error| failed(std::io::Error::other(error)))?;
    stream.set_read_timeout(Some(limit)).map_err(failed)?;
    Ok(stream)
}

/// A number for a new identity, which no snapshot holds and no machine has.
pub(crate) fn generation() -> Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
    // Zero is the generation of a guest that never renewed.
    Ok(u64::from_le_bytes(bytes).max(1))
}

/// A machine id that no other machine has.
pub(crate) fn machine_id() -> Result<String> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
    Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What makes this machine different from its siblings.
fn identity(
    machine: &Machine,
    generation: u64,
    ethernet: Vec<[u8; 6]>,
) -> Result<Identity, ClientError> {
    let mut entropy = vec![0; MIN_ENTROPY];
    getrandom::fill(&mut entropy).map_err(|error| {
        let error = std::io::Error::other(format!("no random bytes: {error}"));
        ClientError::Connection(error.into())
    })?;
    Ok(Identity {
        generation,
        entropy,
        realtime_ns: clock::realtime_ns(),
        hostname: hostname(&machine.name),
        machine_id: machine.identity.machine_id.clone(),
        ethernet,
    })
}

/// A machine's name as a host name.
fn hostname(name: &str) -> String {
    let clean: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    clean.trim_matches('-').to_owned()
}
