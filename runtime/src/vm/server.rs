//! Serving one machine over a channel.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::build::build;
use super::kit::Kit;
use super::machine::{Machine, MachineError, OnEnd};
use super::sources::Sources;
use crate::jail;
use crate::protocol::{VmmEvent, VmmMessage, VmmReply, VmmRequest};
use crate::sys::channel::{Channel, ChannelError};
use crate::sys::event::descriptor;
use crate::vcpu::End;

/// Runs a machine's process until the supervisor stops it or goes away. A
/// machine that is over is reported and kept: others may still copy from its
/// memory. Answers [`VmmRequest`] with [`VmmMessage`].
///
/// This process is not jailed, but for what [`jail::settle`] takes away: machines
/// that are to be are forked from [`super::zygote_main`].
pub fn vmm_main(channel: Channel) -> ExitCode {
    let kit = Sources::open().map_err(MachineError::Device).and_then(|all| Kit::new(&all));
    vmm_with(channel, kit)
}

/// As [`vmm_main`], with parts that are made. If they could not be, the
/// machine is told so that asks for them.
pub(super) fn vmm_with(channel: Channel, kit: Result<Kit, MachineError>) -> ExitCode {
    end_on_panic();
    match serve(&channel, kit) {
        Ok(()) | Err(ChannelError::Closed) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("machine process: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A thread that panics leaves a machine that hangs; the process must end so
/// that the supervisor sees it.
fn end_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        std::process::exit(101);
    }));
}

/// Where a vCPU thread leaves the news that the machine is over.
struct Ending {
    end: Mutex<Option<End>>,
    wake: EventFd,
}

impl Ending {
    fn tell(&self, end: End) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
        // A full counter has woken the server already.
        let _full = self.wake.write(1);
    }

    fn take(&self) -> Option<End> {
        // Empty unless there is news.
        let _empty = self.wake.read();
        self.end.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Ends the process when the supervisor closes its end, even while the server
/// waits for a page that nobody will send any more.
fn end_with_supervisor(channel: &Channel) -> Result<(), ChannelError> {
    let socket = channel.try_clone()?.into_socket();
    std::thread::Builder::new().name("watch".to_owned()).spawn(move || {
        let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
        while poll(&mut fds, None) == Err(Errno::INTR) {}
        std::process::exit(0);
    })?;
    Ok(())
}

fn serve(channel: &Channel, kit: Result<Kit, MachineError>) -> Result<(), ChannelError> {
    end_with_supervisor(channel)?;
    let wake = EventFd::new(EFD_NONBLOCK)?;
    let ending = Arc::new(Ending { end: Mutex::new(None), wake });
    let teller = Arc::clone(&ending);
    let on_end: OnEnd = Arc::new(move |end| teller.tell(end));
    let mut server = Server { channel, kit: Some(kit), machine: None, on_end };
    loop {
        let request = wait(channel, &ending)?;
        if let Some(end) = ending.take() {
            server.report(end)?;
        }
        if request && !server.answer()? {
            return Ok(());
        }
    }
}

/// Waits for a request (`true`) or the machine's end.
fn wait(channel: &Channel, ending: &Ending) -> Result<bool, ChannelError> {
    let mut fds = [
        PollFd::new(channel.socket(), PollFlags::IN),
        PollFd::from_borrowed_fd(descriptor(&ending.wake), PollFlags::IN),
    ];
    loop {
        match poll(&mut fds, None) {
            Ok(_) => return Ok(!fds[0].revents().is_empty()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(ChannelError::Io(errno.into())),
        }
    }
}

struct Server<'a> {
    channel: &'a Channel,
    /// Until the machine is made of it.
    kit: Option<Result<Kit, MachineError>>,
    machine: Option<Machine>,
    on_end: OnEnd,
}

impl Server<'_> {
    /// Answers one request; `false` after the last.
    fn answer(&mut self) -> Result<bool, ChannelError> {
        let (request, descriptors) = self.channel.receive::<VmmRequest>()?;
        let stop = request == VmmRequest::Stop;
        let reply = self.act(request, descriptors);
        self.reply(reply)?;
        Ok(!stop)
    }

    fn act(&mut self, request: VmmRequest, descriptors: Vec<OwnedFd>) -> Result<VmmReply, String> {
        match request {
            VmmRequest::Log => {
                let [log] = one("Log", descriptors)?;
                rustix::stdio::dup2_stderr(&log).map_err(text)?;
                Ok(VmmReply::Logging)
            }
            VmmRequest::Build { config, nets, start } => {
                let kit = self.kit.take().ok_or("this process has had its machine already")?;
                let kit = kit.map_err(text)?;
                let machine =
                    build((config, nets), start, descriptors, kit, &self.on_end).map_err(text)?;
                // Its guest's first instruction is still to come.
                jail::settle().map_err(text)?;
                let regions = machine.handover().regions();
                self.machine = Some(machine);
                Ok(VmmReply::Built { regions })
            }
            VmmRequest::Resume => {
                let entered_ns = self.machine()?.resume().map_err(text)?;
                Ok(VmmReply::Running { entered_ns })
            }
            VmmRequest::Pause { deadline_ms } => {
                self.machine()?.pause(deadline_ms).map_err(text)?;
                Ok(VmmReply::Paused)
            }
            VmmRequest::Save => {
                let (state, overlays) = self.machine()?.save().map_err(text)?;
                Ok(VmmReply::Saved { state, overlays, freed: self.machine()?.freed() })
            }
            VmmRequest::Freeze => {
                let overlays = descriptors.into_iter().map(File::from).collect();
                let (state, overlays) = self.machine()?.freeze(overlays).map_err(text)?;
                Ok(VmmReply::Saved { state, overlays, freed: self.machine()?.freed() })
            }
            VmmRequest::Fold { disk, count, runs } => {
                let [overlay] = <[OwnedFd; 1]>::try_from(descriptors)
                    .map_err(|all| format!("Fold came with {} descriptors, not one", all.len()))?;
                self.machine()?.fold(disk, count, File::from(overlay), &runs).map_err(text)?;
                Ok(VmmReply::Folded)
            }
            VmmRequest::Populate => {
                self.machine()?.populate().map_err(text)?;
                Ok(VmmReply::Populated)
            }
            VmmRequest::Connect { port } => {
                let [stream] = one("Connect", descriptors)?;
                self.machine()?.connect(UnixStream::from(stream), port).map_err(text)?;
                Ok(VmmReply::Connecting)
            }
            VmmRequest::Stop => Ok(VmmReply::Stopping),
        }
    }

    fn machine(&mut self) -> Result<&mut Machine, String> {
        self.machine.as_mut().ok_or_else(|| "this process has no machine yet".to_owned())
    }

    fn reply(&self, reply: Result<VmmReply, String>) -> Result<(), ChannelError> {
        let built = matches!(reply, Ok(VmmReply::Built { .. }));
        let message = VmmMessage::Reply(reply);
        let sent = match &self.machine {
            Some(machine) if built => {
                self.channel.send(&message, &machine.handover().descriptors())
            }
            _ => self.channel.send(&message, &[]),
        };
        match sent {
            // The machine goes on; whoever asked is told.
            Err(error @ ChannelError::TooLarge { .. }) => {
                self.channel.send(&VmmMessage::Reply(Err(error.to_string())), &[])
            }
            sent => sent,
        }
    }

    fn report(&self, end: End) -> Result<(), ChannelError> {
        let End { reason, clean } = end;
        self.channel.send(&VmmMessage::Event(VmmEvent::Exited { reason, clean }), &[])
    }
}

fn one(request: &str, descriptors: Vec<OwnedFd>) -> Result<[OwnedFd; 1], String> {
    <[OwnedFd; 1]>::try_from(descriptors)
        .map_err(|all| format!("{request} came with {} descriptors, not one", all.len()))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
