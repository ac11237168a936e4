//! One connection between a host stream and a guest port.
//!
//! Flow control in both directions: the guest may send as much as fits our
//! buffer, which empties into the host's stream; we send as much as the guest
//! says it has room for, and leave the rest in the host's stream, whose writer
//! then waits. Counters run modulo 2^32, as in the packets.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::packet::{FLAG_SHUTDOWN_RECEIVE, FLAG_SHUTDOWN_SEND, Header, Op, Ports};

/// Room for data from the guest, in bytes.
const BUFFER: u32 = 256 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not yet asked for.
    New,
    /// Asked for, not answered.
    Requested,
    Open,
}

/// Whether a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Keep,
    /// It is over; the guest knows.
    Forget,
    /// It is over; the guest must be told.
    Reset,
}

/// What to wait for on the host's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interest {
    pub(super) read: bool,
    pub(super) write: bool,
    /// Its end, though nothing else is of interest.
    pub(super) hang_up: bool,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    ports: Ports,
    phase: Phase,
    /// Data from the guest on its way to the host.
    buffer: VecDeque<u8>,
    /// Bytes received from the guest.
    received: u32,
    /// Bytes taken out of `buffer`.
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    forwarded_told: u32,
    /// Bytes sent to the guest.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
    credit_asked: bool,
    owes_credit: bool,
    /// The host's stream has data, as far as we know.
    readable: bool,
    hung_up: bool,
    /// The host sends no more, and whether the guest knows.
    host_ended: bool,
    host_end_told: bool,
    /// The guest sends no more.
    guest_ended: bool,
    guest_end_passed_on: bool,
}

impl Connection {
    /// A connection that is still to be asked for.
    pub(super) fn new(stream: UnixStream, ports: Ports) -> io::Result<Self> {
        // As the jail allows it.
        rustix::fs::fcntl_setfl(&stream, rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self {
            stream,
            ports,
            phase: Phase::New,
            buffer: VecDeque::new(),
            received: 0,
            forwarded: 0,
            forwarded_told: 0,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            credit_asked: false,
            owes_credit: false,
            readable: false,
            hung_up: false,
            host_ended: false,
            host_end_told: false,
            guest_ended: false,
            guest_end_passed_on: false,
        })
    }

    /// The host's stream.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Handles a packet of this connection.
    pub(super) fn receive(&mut self, header: &Header, data: &[u8]) -> Fate {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        self.credit_asked = false;
        match (header.op, self.phase) {
            (Op::Reset, _) => Fate::Forget,
            (Op::Response, Phase::Requested) => {
                self.phase = Phase::Open;
                Fate::Keep
            }
            (Op::Data, Phase::Open) => self.accept(data),
            (Op::Shutdown, Phase::Open) => self.shut_down(header.flags),
            (Op::CreditUpdate, Phase::Open) => Fate::Keep,
            (Op::CreditRequest, Phase::Open) => {
                self.owes_credit = true;
                Fate::Keep
            }
            _ => Fate::Reset,
        }
    }

    fn accept(&mut self, data: &[u8]) -> Fate {
        let room = BUFFER - u32::try_from(self.buffer.len()).unwrap_or(BUFFER);
        let Some(len) = u32::try_from(data.len()).ok().filter(|len| *len <= room) else {
            // The guest ignores its credit.
            return Fate::Reset;
        };
        if self.guest_ended {
            return Fate::Reset;
        }
        self.received = self.received.wrapping_add(len);
        self.buffer.extend(data);
        self.flush()
    }

    fn shut_down(&mut self, flags: u32) -> Fate {
        if flags & FLAG_SHUTDOWN_SEND != 0 {
            self.guest_ended = true;
        }
        if flags & FLAG_SHUTDOWN_RECEIVE != 0 {
            // What the host still has to say reaches nobody.
            self.host_ended = true;
            self.host_end_told = true;
        }
        self.flush()
    }

    /// Passes data on to the host, as much as its stream takes.
    pub(super) fn flush(&mut self) -> Fate {
        while !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            match self.stream.write(front) {
                Ok(0) => return Fate::Reset,
                Ok(count) => {
                    self.buffer.drain(..count);
                    let count = u32::try_from(count).unwrap_or(u32::MAX);
                    self.forwarded = self.forwarded.wrapping_add(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Fate::Keep,
                Err(_) => return Fate::Reset,
            }
        }
        if !self.guest_ended {
            return Fate::Keep;
        }
        if !self.guest_end_passed_on {
            self.guest_end_passed_on = true;
            if self.stream.shutdown(std::net::Shutdown::Write).is_err() {
                return Fate::Reset;
            }
        }
        // Both sides have ended and everything is delivered: the reset is the
        // guest's sign that the connection is gone.
        if self.host_ended { Fate::Reset } else { Fate::Keep }
    }

    /// The host's stream has something to read, or has ended.
    pub(super) fn host_ready(&mut self, hung_up: bool) {
        self.readable = true;
        self.hung_up |= hung_up;
    }

    /// What to wait for; data is only of interest if it can be passed on.
    pub(super) fn interest(&self) -> Interest {
        let open = self.phase == Phase::Open;
        let read = open && !self.host_ended && !self.readable && self.credit() > 0;
        let write = !self.buffer.is_empty();
        Interest { read, write, hang_up: !self.hung_up }
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// The next packet for the guest, its data in `room`; `None` if there is
    /// nothing to say now. The second value is the connection's fate
    /// afterwards.
    pub(super) fn next(&mut self, room: &mut [u8]) -> (Option<Header>, Fate) {
        if self.phase == Phase::New {
            self.phase = Phase::Requested;
            return (Some(self.header(Op::Request, 0, 0)), Fate::Keep);
        }
        if self.phase == Phase::Requested {
            return (None, Fate::Keep);
        }
        if self.owes_credit || self.credit_is_due() {
            return (Some(self.header(Op::CreditUpdate, 0, 0)), Fate::Keep);
        }
        if self.readable && !self.host_ended {
            return self.next_data(room);
        }
        if self.host_ended && !self.host_end_told {
            return self.next_end();
        }
        if self.hung_up && self.host_ended {
            // Nobody reads what the guest says: both directions are over.
            let flags = FLAG_SHUTDOWN_RECEIVE | FLAG_SHUTDOWN_SEND;
            return (Some(self.header(Op::Shutdown, flags, 0)), Fate::Forget);
        }
        (None, Fate::Keep)
    }

    fn next_data(&mut self, room: &mut [u8]) -> (Option<Header>, Fate) {
        let credit = self.credit();
        if credit == 0 {
            if self.credit_asked {
                return (None, Fate::Keep);
            }
            self.credit_asked = true;
            return (Some(self.header(Op::CreditRequest, 0, 0)), Fate::Keep);
        }
        let limit = room.len().min(usize::try_from(credit).unwrap_or(usize::MAX));
        if limit == 0 {
            // A buffer for a header only.
            return (None, Fate::Keep);
        }
        loop {
            match self.stream.read(&mut room[..limit]) {
                Ok(0) => {
                    self.host_ended = true;
                    return self.next_end();
                }
                Ok(count) => {
                    let len = u32::try_from(count).unwrap_or(u32::MAX);
                    self.sent = self.sent.wrapping_add(len);
                    return (Some(self.header(Op::Data, 0, len)), Fate::Keep);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return (None, Fate::Keep);
                }
                Err(_) => return (None, Fate::Reset),
            }
        }
    }

    /// Tells the guest that the host sends no more, or that it is gone.
    fn next_end(&mut self) -> (Option<Header>, Fate) {
        self.host_end_told = true;
        let (flags, fate) = if self.hung_up {
            (FLAG_SHUTDOWN_RECEIVE | FLAG_SHUTDOWN_SEND, Fate::Forget)
        } else if self.guest_ended && self.buffer.is_empty() {
            (FLAG_SHUTDOWN_SEND, Fate::Reset)
        } else {
            (FLAG_SHUTDOWN_SEND, Fate::Keep)
        };
        (Some(self.header(Op::Shutdown, flags, 0)), fate)
    }

    /// The guest should hear of free room before it runs out.
    fn credit_is_due(&self) -> bool {
        let known_room = BUFFER.saturating_sub(self.received.wrapping_sub(self.forwarded_told));
        self.forwarded != self.forwarded_told && known_room < BUFFER / 2
    }

    fn header(&mut self, op: Op, flags: u32, len: u32) -> Header {
        self.forwarded_told = self.forwarded;
        self.owes_credit = false;
        let (ports, fwd_cnt) = (self.ports, self.forwarded);
        Header { ports, op, flags, len, buf_alloc: BUFFER, fwd_cnt }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORTS: Ports = Ports { host: 9, guest: 1024 };

    fn from_guest(op: Op, flags: u32, fwd_cnt: u32, buf_alloc: u32) -> Header {
        Header { ports: PORTS, op, flags, len: 0, buf_alloc, fwd_cnt }
    }

    fn open(guest_buffer: u32) -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(ours, PORTS).unwrap();
        let (request, _) = connection.next(&mut []);
        assert_eq!(request.unwrap().op, Op::Request);
        let response = from_guest(Op::Response, 0, 0, guest_buffer);
        assert_eq!(connection.receive(&response, &[]), Fate::Keep);
        (connection, theirs)
    }

    #[test]
    fn the_guest_gets_no_more_than_it_has_room_for() {
        let (mut connection, mut host) = open(100);
        host.write_all(&[7; 150]).unwrap();
        connection.host_ready(false);
        let mut room = [0; 80];
        let lens: Vec<u32> = (0..2).map(|_| connection.next(&mut room).0.unwrap().len).collect();
        assert_eq!(lens, [80, 20]);
        assert_eq!(connection.next(&mut room).0.unwrap().op, Op::CreditRequest);
        assert_eq!(connection.next(&mut room).0, None, "asked twice");
        assert!(!connection.interest().read);
        connection.receive(&from_guest(Op::CreditUpdate, 0, 100, 100), &[]);
        assert_eq!(connection.next(&mut room).0.unwrap().len, 50);
    }

    #[test]
    fn a_guest_that_ignores_its_credit_is_reset() {
        let (mut connection, host) = open(100);
        let data = vec![1; 64 << 10];
        let mut fate = Fate::Keep;
        for _ in 0..64 {
            fate = connection.receive(&from_guest(Op::Data, 0, 0, 100), &data);
            if fate != Fate::Keep {
                break;
            }
            assert!(connection.buffer.len() <= BUFFER as usize);
        }
        assert_eq!(fate, Fate::Reset);
        drop(host);
    }

    #[test]
    fn the_guest_hears_of_free_room() {
        let (mut connection, mut host) = open(100);
        let data = vec![1; 50_000];
        for _ in 0..3 {
            assert_eq!(connection.receive(&from_guest(Op::Data, 0, 0, 100), &data), Fate::Keep);
            host.read_exact(&mut vec![0; 50_000]).unwrap();
            connection.flush();
        }
        let update = connection.next(&mut []).0.unwrap();
        assert_eq!((update.op, update.fwd_cnt), (Op::CreditUpdate, 150_000));
        assert_eq!(connection.next(&mut []).0, None);
    }

    #[test]
    fn an_end_of_input_leaves_the_answer_alone() {
        let (mut connection, mut host) = open(1000);
        host.write_all(b"question").unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        connection.host_ready(false);
        let mut room = [0; 100];
        assert_eq!(connection.next(&mut room).0.unwrap().op, Op::Data);
        let (end, fate) = connection.next(&mut room);
        let end = end.unwrap();
        assert_eq!((end.op, end.flags, fate), (Op::Shutdown, FLAG_SHUTDOWN_SEND, Fate::Keep));
        assert_eq!(connection.receive(&from_guest(Op::Data, 0, 8, 1000), b"answer"), Fate::Keep);
        let both = FLAG_SHUTDOWN_SEND | FLAG_SHUTDOWN_RECEIVE;
        let last = connection.receive(&from_guest(Op::Shutdown, both, 8, 1000), &[]);
        assert_eq!(last, Fate::Reset);
        drop(connection);
        let mut answer = String::new();
        host.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
    }

    #[test]
    fn a_host_that_is_gone_ends_the_connection_after_its_data() {
        let (mut connection, mut host) = open(1000);
        host.write_all(b"last words").unwrap();
        drop(host);
        connection.host_ready(true);
        let mut room = [0; 100];
        assert_eq!(connection.next(&mut room).0.unwrap().len, 10);
        let (end, fate) = connection.next(&mut room);
        assert_eq!((end.unwrap().flags, fate), (3, Fate::Forget));
    }

    #[test]
    fn packets_out_of_order_reset() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(ours, PORTS).unwrap();
        assert_eq!(connection.receive(&from_guest(Op::Data, 0, 0, 9), b"x"), Fate::Reset);
        let (mut connection, _host) = open(100);
        assert_eq!(connection.receive(&from_guest(Op::Response, 0, 0, 9), &[]), Fate::Reset);
    }
}
