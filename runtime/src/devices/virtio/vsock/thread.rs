//! The device's thread: waits for the driver, for hosts' streams and for new
//! streams, and moves packets.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::event::epoll::{self, EventData, EventFlags};
use virtio_vsock::packet::VsockPacket;
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

use super::super::super::gate::Pass;
use super::super::segments::Buffers;
use super::super::transport::{Broken, Taken, Transport};
use super::super::worker::{WorkerError, drain, spawn, wait};
use super::connection::Interest;
use super::packet::{self, FromGuest};
use super::{QUEUE_EVENT, QUEUE_RECEIVE, QUEUE_SEND, Reset, Shared, lock};
use crate::sys::event::descriptor;

/// Largest packet in either direction, in bytes.
const DATA_MAX: u32 = 64 << 10;
/// Length of a packet's header in bytes.
const PACKET_HEADER: u32 = 44;
/// Marks events that are no connection's; host ports are below.
const DRIVER: u64 = u64::MAX;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`
const TRANSPORT_RESET: [u8; 4] = [0; 4];

struct Thread {
    transport: Arc<Transport>,
    shared: Arc<Mutex<Shared>>,
    called: Arc<EventFd>,
    poll: OwnedFd,
    /// What epoll waits for, by host port.
    registered: HashMap<u32, Interest>,
    epoch: u64,
    room: Vec<u8>,
}

/// Starts the thread.
pub(super) fn start(
    transport: Arc<Transport>,
    shared: Arc<Mutex<Shared>>,
    called: Arc<EventFd>,
) -> Result<(), WorkerError> {
    let failed = |errno: rustix::io::Errno| WorkerError::of("vsock", errno.into());
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
    for event in transport.notify().iter().chain([called.as_ref()]) {
        let data = EventData::new_u64(DRIVER);
        epoll::add(&poll, descriptor(event), data, EventFlags::IN).map_err(failed)?;
    }
    let epoch = transport.epoch();
    let room = vec![0; usize::try_from(DATA_MAX).unwrap_or(0)];
    let registered = HashMap::new();
    let thread = Thread { transport, shared, called, poll, registered, epoch, room };
    spawn("vsock", move || thread.run())
}

impl Thread {
    fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        loop {
            self.step();
            if let Err(errno) = wait(&self.poll, &mut events) {
                tracing::error!("vsock: epoll: {errno}");
                return;
            }
            for event in &events {
                self.note(event.data.u64(), event.flags);
            }
        }
    }

    fn note(&mut self, data: u64, flags: EventFlags) {
        let Ok(host) = u32::try_from(data) else {
            self.transport.notify().iter().for_each(drain);
            drain(&self.called);
            return;
        };
        let hung_up = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        let (read, write) = (flags.contains(EventFlags::IN), flags.contains(EventFlags::OUT));
        lock(&self.shared).mux.host_ready(host, read, write, hung_up);
    }

    /// Moves all that can be moved, then says what to wait for.
    fn step(&mut self) {
        for (queue, chains) in [(QUEUE_SEND, 8), (QUEUE_RECEIVE, 2), (QUEUE_EVENT, 1)] {
            self.transport.prefault(queue, chains);
        }
        let transport = Arc::clone(&self.transport);
        let shared = Arc::clone(&self.shared);
        let pass = transport.enter();
        let mut shared = lock(&shared);
        if transport.epoch() != self.epoch {
            self.epoch = transport.epoch();
            shared.mux.clear();
            shared.reset = Reset::None;
        }
        let moved = self.reset(&pass, &mut shared).and_then(|()| self.exchange(&pass, &mut shared));
        if let Err(broken) = moved {
            transport.fail(&pass, broken);
        }
        drop(pass);
        self.register(&shared);
    }

    /// Sends what waits for the guest, takes what it sends, and sends the
    /// answers.
    fn exchange(&mut self, pass: &Pass<'_>, shared: &mut Shared) -> Result<(), Broken> {
        if !self.transport.active() {
            return Ok(());
        }
        if shared.reset == Reset::None {
            for (stream, port) in std::mem::take(&mut shared.calls) {
                if let Err(error) = shared.mux.connect(stream, port) {
                    tracing::warn!("vsock: connection to port {port}: {error}");
                }
            }
        }
        loop {
            self.send_to_guest(pass, shared)?;
            if !self.take_from_guest(pass, shared)? {
                return Ok(());
            }
        }
    }

    /// Fills the guest's receive buffers.
    fn send_to_guest(&mut self, pass: &Pass<'_>, shared: &mut Shared) -> Result<(), Broken> {
        while let Some(Taken { ticket, mut chain }) = self.transport.take(pass, QUEUE_RECEIVE) {
            let memory = self.transport.memory();
            let mut packet = VsockPacket::from_rx_virtq_chain(memory, &mut chain, u32::MAX)
                .map_err(|_| Broken("a vsock receive buffer makes no sense"))?;
            let limit = packet.data_slice().map_or(0, VolatileSlice::len).min(self.room.len());
            let Some(header) = shared.mux.next(&mut self.room[..limit]) else {
                self.transport.put_back(pass, ticket);
                return Ok(());
            };
            packet::write(&mut packet, &header);
            let len = usize::try_from(header.len).unwrap_or(0);
            if let Some(data) = packet.data_slice() {
                data.copy_from(&self.room[..len]);
            }
            self.transport.finish(pass, ticket, PACKET_HEADER + header.len);
        }
        Ok(())
    }

    /// Takes the guest's packets; whether there was one.
    fn take_from_guest(&mut self, pass: &Pass<'_>, shared: &mut Shared) -> Result<bool, Broken> {
        let mut any = false;
        while shared.mux.can_receive() {
            let Some(Taken { ticket, mut chain }) = self.transport.take(pass, QUEUE_SEND) else {
                break;
            };
            any = true;
            let memory = self.transport.memory();
            let packet = VsockPacket::from_tx_virtq_chain(memory, &mut chain, DATA_MAX)
                .map_err(|_| Broken("a vsock packet makes no sense"))?;
            match packet::read(&packet) {
                FromGuest::Ours(header) => {
                    let len = usize::try_from(header.len).unwrap_or(0);
                    let mut data = vec![0; len];
                    if let Some(slice) = packet.data_slice() {
                        slice.copy_to(&mut data[..]);
                    }
                    shared.mux.receive(&header, &data);
                }
                FromGuest::Refuse(ports) => shared.mux.refuse(ports),
                FromGuest::Ignore => {}
            }
            self.transport.finish(pass, ticket, 0);
        }
        Ok(any)
    }

    /// Moves a transport reset on.
    fn reset(&self, pass: &Pass<'_>, shared: &mut Shared) -> Result<(), Broken> {
        match shared.reset {
            Reset::None => {}
            Reset::Due if !self.transport.active() => shared.reset = Reset::None,
            Reset::Due => {
                let available = self.transport.notify_when_more(pass, QUEUE_EVENT)?;
                let Some(Taken { ticket, chain }) = self.transport.take(pass, QUEUE_EVENT) else {
                    return Ok(());
                };
                let buffers = Buffers::of(chain)?;
                buffers.writable.write(self.transport.memory(), 0, &TRANSPORT_RESET)?;
                self.transport.finish(pass, ticket, 4);
                shared.reset = Reset::Sent { available };
            }
            Reset::Sent { available } => {
                if self.transport.notify_when_more(pass, QUEUE_EVENT)? != available {
                    shared.reset = Reset::None;
                }
            }
        }
        Ok(())
    }

    /// Tells epoll what each connection waits for.
    fn register(&mut self, shared: &Shared) {
        let wanted: HashMap<u32, Interest> = shared
            .mux
            .connections()
            .map(|(host, connection)| (host, connection.interest()))
            .collect();
        // A dropped connection's stream is closed, which removed it.
        self.registered.retain(|host, _| wanted.contains_key(host));
        for (host, connection) in shared.mux.connections() {
            let interest = wanted[&host];
            let before = self.registered.get(&host).copied();
            if before == Some(interest) {
                continue;
            }
            let mut flags = EventFlags::empty();
            flags.set(EventFlags::IN, interest.read);
            flags.set(EventFlags::OUT, interest.write);
            let data = EventData::new_u64(u64::from(host));
            let silent = flags.is_empty() && !interest.hang_up;
            let stream = connection.stream();
            let changed = match (before, silent) {
                (Some(_), true) => epoll::delete(&self.poll, stream),
                (Some(_), false) => epoll::modify(&self.poll, stream, data, flags),
                (None, true) => Ok(()),
                (None, false) => epoll::add(&self.poll, stream, data, flags),
            };
            match changed {
                Ok(()) if silent => drop(self.registered.remove(&host)),
                Ok(()) => drop(self.registered.insert(host, interest)),
                Err(errno) => tracing::warn!("vsock: epoll: {errno}"),
            }
        }
    }
}
