//! The device's thread: waits for the driver, for hosts' streams and for new
//! streams, and moves packets.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
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
    let thread = Thread::new(transport, shared, called)
        .map_err(|errno| WorkerError::of("vsock", errno.into()))?;
    spawn("vsock", move || thread.run())
}

impl Thread {
    fn new(
        transport: Arc<Transport>,
        shared: Arc<Mutex<Shared>>,
        called: Arc<EventFd>,
    ) -> Result<Self, Errno> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for event in transport.notify().iter().chain([called.as_ref()]) {
            epoll::add(&poll, descriptor(event), EventData::new_u64(DRIVER), EventFlags::IN)?;
        }
        let epoch = transport.epoch();
        let room = vec![0; usize::try_from(DATA_MAX).unwrap_or(0)];
        let registered = HashMap::new();
        Ok(Self { transport, shared, called, poll, registered, epoch, room })
    }

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

#[cfg(any(test, feature = "fuzzing"))]
/// The device without a thread, for those who play its driver.
pub(in super::super) struct Puppet {
    thread: Thread,
    hosts: Vec<std::os::unix::net::UnixStream>,
}

#[cfg(any(test, feature = "fuzzing"))]
impl Puppet {
    /// Hosts' streams that are open at once.
    const HOSTS_MAX: usize = 8;

    pub(in super::super) fn new(transport: &Arc<Transport>) -> Self {
        let mux = super::mux::Mux::new(0);
        let shared = Arc::new(Mutex::new(Shared { mux, reset: Reset::Due, calls: Vec::new() }));
        let called = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).expect("an eventfd");
        let thread =
            Thread::new(Arc::clone(transport), shared, Arc::new(called)).expect("an epoll");
        Self { thread, hosts: Vec::new() }
    }

    /// Hears what is ready, and moves all that can be moved.
    pub(in super::super) fn step(&mut self) {
        let ready: Vec<u32> = self.thread.registered.keys().copied().collect();
        for host in ready {
            self.thread.note(u64::from(host), EventFlags::IN | EventFlags::OUT);
        }
        self.thread.step();
    }

    /// A host calls, writes, reads or hangs up.
    pub(in super::super) fn host(&mut self, what: u8, bytes: &[u8]) {
        use std::io::{Read, Write};
        let at = usize::from(what >> 2).checked_rem(self.hosts.len());
        match (what & 3, at) {
            (0, _) if self.hosts.len() < Self::HOSTS_MAX => {
                let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("two sockets");
                theirs.set_nonblocking(true).expect("a socket's mode");
                lock(&self.thread.shared).calls.push((ours, u32::from(what)));
                self.hosts.push(theirs);
            }
            (1, Some(at)) => drop((&self.hosts[at]).write(bytes)),
            (2, Some(at)) => drop((&self.hosts[at]).read(&mut [0; 4096])),
            (3, Some(at)) => drop(self.hosts.swap_remove(at)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::super::mux::Mux;
    use super::super::{Reset, Vsock};
    use super::*;
    use crate::devices::virtio::testing::{BUFFERS, Driver, NEXT, WRITE, write};

    const RECEIVE: u64 = BUFFERS;
    const SEND: u64 = BUFFERS + 0x10_000;
    const EVENT: u64 = BUFFERS + 0x20_000;

    struct Guest {
        driver: Driver,
        thread: Thread,
        received: usize,
        host_port: u32,
    }

    impl Guest {
        fn new(reset: Reset) -> Self {
            let driver = Driver::new(Vsock::identity());
            let shared = Shared { mux: Mux::new(0), reset, calls: Vec::new() };
            let called = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
            let transport = Arc::clone(&driver.transport);
            let shared = Arc::new(Mutex::new(shared));
            let thread = Thread::new(transport, shared, Arc::new(called)).unwrap();
            Self { driver, thread, received: 0, host_port: 0 }
        }

        fn room(&self, buffers: u16) {
            for index in 0..buffers {
                let at = RECEIVE + 0x1000 * u64::from(index);
                self.driver.offer(QUEUE_RECEIVE, index, &[(at, 0x1000, WRITE)]);
            }
        }

        fn header(op: u16, host_port: u32, len: u32) -> Vec<u8> {
            let mut bytes = 3u64.to_le_bytes().to_vec();
            bytes.extend(2u64.to_le_bytes());
            for word in [1024, host_port, len] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend(1u16.to_le_bytes());
            bytes.extend(op.to_le_bytes());
            for word in [0u32, 64 << 10, 0] {
                bytes.extend(word.to_le_bytes());
            }
            bytes
        }

        fn send(&mut self, op: u16, data: &[u8]) {
            let len = u32::try_from(data.len()).unwrap();
            self.driver.put(SEND, &Self::header(op, self.host_port, len));
            self.driver.put(SEND + 44, data);
            self.driver.offer(QUEUE_SEND, 0, &[(SEND, 44 + len, 0)]);
            self.thread.step();
        }

        /// The next packet that the guest received: its operation and data.
        fn next(&mut self) -> Option<(u16, Vec<u8>)> {
            let used = self.driver.used(QUEUE_RECEIVE);
            let (head, len) = *used.get(self.received)?;
            self.received += 1;
            let at = RECEIVE + 0x1000 * u64::from(head);
            let bytes = self.driver.get(at, len as usize);
            self.host_port = u32::from_le_bytes(bytes[16..20].try_into().unwrap());
            Some((u16::from_le_bytes([bytes[30], bytes[31]]), bytes[44..].to_vec()))
        }

        fn call(&mut self) -> UnixStream {
            let (ours, theirs) = UnixStream::pair().unwrap();
            lock(&self.thread.shared).calls.push((ours, 1024));
            self.thread.step();
            theirs
        }

        /// Waits for the hosts' streams once and moves on.
        fn turn(&mut self) {
            let mut events = Vec::with_capacity(8);
            wait(&self.thread.poll, &mut events).unwrap();
            for event in &events {
                self.thread.note(event.data.u64(), event.flags);
            }
            self.thread.step();
        }
    }

    #[test]
    fn a_stream_carries_both_ways() {
        let mut guest = Guest::new(Reset::None);
        guest.room(8);
        let mut host = guest.call();
        assert_eq!(guest.next().unwrap().0, 1);
        guest.send(2, &[]);
        host.write_all(b"question").unwrap();
        while guest.driver.used(QUEUE_RECEIVE).len() < 2 {
            guest.turn();
        }
        assert_eq!(guest.next().unwrap(), (5, b"question".to_vec()));
        guest.send(5, b"answer");
        let mut answer = [0; 6];
        host.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        guest.send(3, &[]);
        assert_eq!(host.read(&mut answer).unwrap(), 0);
    }

    #[test]
    fn without_room_packets_wait() {
        let mut guest = Guest::new(Reset::None);
        let _host = guest.call();
        assert_eq!(guest.next(), None);
        guest.room(1);
        guest.thread.step();
        assert_eq!(guest.next().unwrap().0, 1);
    }

    #[test]
    fn calls_wait_until_the_guest_has_heard_of_the_reset() {
        let mut guest = Guest::new(Reset::Due);
        guest.room(8);
        guest.driver.offer(QUEUE_EVENT, 0, &[(EVENT, 4, WRITE)]);
        guest.driver.put(EVENT, &[9; 4]);
        let _host = guest.call();
        assert_eq!(guest.driver.used(QUEUE_EVENT), [(0, 4)]);
        assert_eq!(guest.driver.get(EVENT, 4), TRANSPORT_RESET);
        assert_eq!(guest.next(), None, "the call must not be among what is reset");
        guest.thread.step();
        assert_eq!(guest.next(), None);
        guest.driver.make_available(QUEUE_EVENT, 0);
        guest.thread.step();
        assert_eq!(guest.next().unwrap().0, 1);
    }

    #[test]
    fn hostile_packets_stop_the_device() {
        let hostile: [&[(u64, u32, u16)]; 4] = [
            // Too short, outside memory, longer than allowed, not readable.
            &[(SEND, 10, 0)],
            &[(u64::MAX - 8, 44, 0)],
            &[(SEND, 44, 0), (SEND + 0x1000, u32::MAX - 100, 0)],
            &[(SEND, 44, WRITE)],
        ];
        for chain in hostile {
            let mut guest = Guest::new(Reset::None);
            guest.driver.put(SEND, &Guest::header(5, 0, u32::MAX - 100));
            guest.driver.offer(QUEUE_SEND, 0, chain);
            guest.thread.step();
            assert!(guest.driver.needs_reset(), "{chain:?}");
        }
    }

    #[test]
    fn hostile_receive_buffers_stop_the_device() {
        for chain in [(RECEIVE, 20, WRITE), (RECEIVE, 44, 0), (u64::MAX - 8, 99, WRITE)] {
            let mut guest = Guest::new(Reset::None);
            guest.driver.offer(QUEUE_RECEIVE, 0, &[chain]);
            let _host = guest.call();
            assert!(guest.driver.needs_reset(), "{chain:?}");
        }
    }

    #[test]
    fn a_buffer_for_a_header_only_carries_no_data() {
        let mut guest = Guest::new(Reset::None);
        guest.driver.describe(QUEUE_RECEIVE, 0, (RECEIVE, 44, WRITE | NEXT, 1));
        guest.driver.describe(QUEUE_RECEIVE, 1, (RECEIVE + 64, 0, WRITE, 0));
        guest.driver.make_available(QUEUE_RECEIVE, 0);
        let _host = guest.call();
        assert_eq!(guest.driver.used(QUEUE_RECEIVE), [(0, 44)]);
    }

    #[test]
    fn a_reset_of_the_driver_ends_all_connections() {
        let mut guest = Guest::new(Reset::None);
        guest.room(8);
        let mut host = guest.call();
        write(&guest.driver.transport, 0x70, 0);
        guest.thread.step();
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }
}
