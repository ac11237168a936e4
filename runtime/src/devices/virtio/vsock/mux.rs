//! All connections of a machine.
//!
//! Answers that belong to no connection any more (resets) wait in a bounded
//! queue: while it is full, no packet is taken from the guest, so a guest that
//! sends nonsense slows down only itself.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;

use super::connection::{Connection, Fate};
use super::packet::{Header, Op, Ports};

/// The first port on the host's side; lower ones are for services.
const FIRST_PORT: u32 = 1 << 30;
/// Resets that wait for room in the guest's receive queue.
const RESETS_MAX: usize = 256;

/// The connections and what they have to say.
#[derive(Debug)]
pub(super) struct Mux {
    connections: HashMap<u32, Connection>,
    guest_ports: HashMap<u32, u32>,
    /// Host ports of connections in the order in which they get a turn.
    turns: VecDeque<u32>,
    resets: VecDeque<Ports>,
    next_port: u32,
}

impl Mux {
    /// No connections; the next one gets `next_port`.
    pub(super) fn new(next_port: u32) -> Self {
        Self {
            connections: HashMap::new(),
            guest_ports: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: next_port.max(FIRST_PORT),
        }
    }

    /// The port of the next connection. Part of the machine's state, so that a
    /// continued guest does not meet a port that it knows.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    /// How many connections there are.
    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }

    /// All host ports with their connections.
    pub(super) fn connections(&self) -> impl Iterator<Item = (u32, &Connection)> {
        self.connections.iter().map(|(port, connection)| (*port, connection))
    }

    /// Starts a connection to a guest port and returns its host port.
    pub(super) fn connect(&mut self, stream: UnixStream, guest: u32) -> io::Result<u32> {
        while self.connections.contains_key(&self.next_port) {
            self.advance_port();
        }
        let host = self.next_port;
        self.advance_port();
        let connection = Connection::new(stream, Ports { host, guest })?;
        self.connections.insert(host, connection);
        self.guest_ports.insert(host, guest);
        self.turns.push_back(host);
        Ok(host)
    }

    fn advance_port(&mut self) {
        self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
    }

    /// Whether a packet from the guest can be answered now.
    pub(super) fn can_receive(&self) -> bool {
        self.resets.len() < RESETS_MAX
    }

    /// Handles a packet from the guest.
    pub(super) fn receive(&mut self, header: &Header, data: &[u8]) {
        let Ports { host, guest } = header.ports;
        if self.guest_ports.get(&host) != Some(&guest) {
            // Nobody listens on the host's side, and nothing is known of this
            // connection.
            if header.op != Op::Reset {
                self.refuse(header.ports);
            }
            return;
        }
        if let Some(connection) = self.connections.get_mut(&host) {
            let fate = connection.receive(header, data);
            self.settle(host, fate);
        }
    }

    /// Answers with a reset.
    pub(super) fn refuse(&mut self, ports: Ports) {
        self.resets.push_back(ports);
    }

    /// The host's stream of a connection can be used.
    pub(super) fn host_ready(&mut self, host: u32, read: bool, write: bool, hung_up: bool) {
        let Some(connection) = self.connections.get_mut(&host) else { return };
        if read || hung_up {
            connection.host_ready(hung_up);
        }
        if write {
            let fate = connection.flush();
            self.settle(host, fate);
        }
    }

    /// The next packet for the guest, its data in `room`.
    pub(super) fn next(&mut self, room: &mut [u8]) -> Option<Header> {
        if let Some(ports) = self.resets.pop_front() {
            let (buf_alloc, fwd_cnt) = (0, 0);
            return Some(Header { ports, op: Op::Reset, flags: 0, len: 0, buf_alloc, fwd_cnt });
        }
        for _ in 0..self.turns.len() {
            let host = self.turns.pop_front()?;
            let Some(connection) = self.connections.get_mut(&host) else { continue };
            let (header, fate) = connection.next(room);
            self.turns.push_back(host);
            self.settle(host, fate);
            if header.is_some() {
                return header;
            }
        }
        // A connection may have asked for a reset without a packet.
        if self.resets.is_empty() { None } else { self.next(room) }
    }

    /// Drops all connections: their hosts see the end of their streams.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.guest_ports.clear();
        self.turns.clear();
        self.resets.clear();
    }

    fn settle(&mut self, host: u32, fate: Fate) {
        if fate == Fate::Keep {
            return;
        }
        self.connections.remove(&host);
        self.turns.retain(|port| *port != host);
        if let Some(guest) = self.guest_ports.remove(&host)
            && fate == Fate::Reset
        {
            self.refuse(Ports { host, guest });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn packet(ports: Ports, op: Op) -> Header {
        Header { ports, op, flags: 0, len: 0, buf_alloc: 1000, fwd_cnt: 0 }
    }

    #[test]
    fn a_call_from_the_guest_is_refused() {
        let mut mux = Mux::new(0);
        let ports = Ports { host: 5, guest: 77 };
        mux.receive(&packet(ports, Op::Request), &[]);
        let answer = mux.next(&mut []).unwrap();
        assert_eq!((answer.op, answer.ports), (Op::Reset, ports));
        mux.receive(&packet(ports, Op::Reset), &[]);
        assert_eq!(mux.next(&mut []), None, "a reset is not answered");
    }

    #[test]
    fn a_refusal_closes_the_stream() {
        let mut mux = Mux::new(0);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let host = mux.connect(ours, 1024).unwrap();
        let request = mux.next(&mut []).unwrap();
        assert_eq!(request.op, Op::Request);
        mux.receive(&packet(Ports { host, guest: 1024 }, Op::Reset), &[]);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        assert_eq!((mux.len(), mux.next(&mut [])), (0, None));
    }

    #[test]
    fn connections_take_turns() {
        let mut mux = Mux::new(0);
        let mut streams = Vec::new();
        for _ in 0..3 {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let host = mux.connect(ours, 1024).unwrap();
            let ports = Ports { host, guest: 1024 };
            mux.next(&mut []).unwrap();
            mux.receive(&packet(ports, Op::Response), &[]);
            theirs.write_all(&[0; 300]).unwrap();
            mux.host_ready(host, true, false, false);
            streams.push(theirs);
        }
        let mut room = [0; 100];
        let hosts: Vec<u32> =
            (0..6).map(|_| mux.next(&mut room).unwrap().ports.host - FIRST_PORT).collect();
        assert_eq!(hosts[..3], hosts[3..]);
        assert_eq!(hosts.iter().collect::<std::collections::HashSet<_>>().len(), 3);
    }

    #[test]
    fn nonsense_is_bounded() {
        let mut mux = Mux::new(0);
        let mut taken = 0;
        while mux.can_receive() {
            mux.receive(&packet(Ports { host: 1, guest: taken }, Op::Data), &[]);
            taken += 1;
        }
        assert_eq!(taken, 256);
        assert!(mux.next(&mut []).is_some() && mux.can_receive());
    }

    #[test]
    fn ports_go_on_and_wrap() {
        let mut mux = Mux::new(u32::MAX);
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(mux.connect(ours, 1).unwrap(), u32::MAX);
        assert_eq!(mux.next_port(), FIRST_PORT);
    }
}
