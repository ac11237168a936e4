//! The device's thread: frames from the driver to the link and back.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

use super::super::segments::Buffers;
use super::super::transport::{Broken, Taken, Transport};
use super::super::worker::{WorkerError, drain, spawn, wait};
use super::{FRAME_LEN_MAX, HEADER_LEN, QUEUE_RECEIVE, QUEUE_SEND};
use crate::sys::event::descriptor;

/// Frames moved in one direction before the other has its turn.
const TURN: usize = 64;
/// Who has something, in events.
const QUEUES: u64 = 0;
const LINK: u64 = 1;
/// Where the header says in how many buffers the frame lies.
const BUFFERS_AT: usize = 10;

struct Thread {
    transport: Arc<Transport>,
    /// `None` once it is gone for good.
    link: Option<OwnedFd>,
    poll: OwnedFd,
    /// A frame that waits for a buffer; the first bytes of `incoming`.
    held: Option<usize>,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Whether epoll watches the link for frames.
    watches: bool,
}

/// Whether there may be more to move right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Done,
    More,
}

/// Starts the thread.
pub(super) fn start(
    name: &str,
    transport: Arc<Transport>,
    link: OwnedFd,
) -> Result<(), WorkerError> {
    let thread =
        Thread::new(transport, link).map_err(|errno| WorkerError::of(name, errno.into()))?;
    spawn(name, move || thread.run())
}

impl Thread {
    fn new(transport: Arc<Transport>, link: OwnedFd) -> Result<Self, Errno> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for event in transport.notify() {
            epoll::add(&poll, descriptor(event), EventData::new_u64(QUEUES), EventFlags::IN)?;
        }
        epoll::add(&poll, link.as_fd(), EventData::new_u64(LINK), EventFlags::empty())?;
        Ok(Self {
            transport,
            link: Some(link),
            poll,
            held: None,
            incoming: vec![0; FRAME_LEN_MAX],
            outgoing: vec![0; FRAME_LEN_MAX],
            watches: false,
        })
    }

    fn run(mut self) {
        let mut events = Vec::with_capacity(4);
        loop {
            self.step();
            if let Err(errno) = wait(&self.poll, &mut events) {
                tracing::error!("network: epoll: {errno}");
                return;
            }
            let gone = EventFlags::ERR | EventFlags::HUP;
            // Copied out of a packed structure.
            let is_gone = |&epoll::Event { flags, data }: &epoll::Event| {
                data.u64() == LINK && flags.intersects(gone)
            };
            if events.iter().any(is_gone) {
                self.unplug();
            }
            self.transport.notify().iter().for_each(drain);
        }
    }

    /// Moves all that can be moved, then says what to wait for.
    fn step(&mut self) {
        loop {
            let moved = self.send().and_then(|sent| Ok((sent, self.receive()?)));
            match moved {
                Ok((Turn::Done, Turn::Done)) => break,
                Ok(_) => {}
                Err(broken) => {
                    let pass = self.transport.enter();
                    self.transport.fail(&pass, broken);
                    break;
                }
            }
        }
        self.watch();
    }

    /// From the driver to the link.
    fn send(&mut self) -> Result<Turn, Broken> {
        let transport = Arc::clone(&self.transport);
        for _ in 0..TURN {
            transport.prefault(QUEUE_SEND, 4);
            let pass = transport.enter();
            let Some(Taken { ticket, chain }) = transport.take(&pass, QUEUE_SEND) else {
                return Ok(Turn::Done);
            };
            drop(pass);
            let buffers = Buffers::of(chain)?;
            let len = usize::try_from(buffers.readable.len()).unwrap_or(usize::MAX);
            // What is no frame is lost, as it would be on a wire.
            if (HEADER_LEN + 1..=FRAME_LEN_MAX).contains(&len) {
                buffers.readable.read(transport.memory(), 0, &mut self.outgoing[..len])?;
                self.put_on_link(len);
            }
            transport.finish(&transport.enter(), ticket, 0);
        }
        Ok(Turn::More)
    }

    fn put_on_link(&mut self, len: usize) {
        let Some(link) = &self.link else { return };
        loop {
            match rustix::io::write(link, &self.outgoing[..len]) {
                Err(Errno::INTR) => {}
                Err(Errno::BADFD | Errno::NODEV) => return self.unplug(),
                // A link that is down or full loses the frame.
                Err(_) | Ok(_) => return,
            }
        }
    }

    /// From the link to the driver.
    fn receive(&mut self) -> Result<Turn, Broken> {
        let transport = Arc::clone(&self.transport);
        if !transport.active() {
            return Ok(Turn::Done);
        }
        for _ in 0..TURN {
            let Some(len) = self.held.take().or_else(|| self.take_from_link()) else {
                return Ok(Turn::Done);
            };
            transport.prefault(QUEUE_RECEIVE, 1);
            let pass = transport.enter();
            let Some(Taken { ticket, chain }) = transport.take(&pass, QUEUE_RECEIVE) else {
                self.held = Some(len);
                return Ok(Turn::Done);
            };
            let buffers = Buffers::of(chain)?;
            if buffers.writable.len() < len as u64 {
                // The driver's buffers are for shorter frames: this one is lost.
                transport.put_back(&pass, ticket);
                continue;
            }
            let frame = &mut self.incoming[..len];
            frame[BUFFERS_AT..HEADER_LEN].copy_from_slice(&1u16.to_le_bytes());
            buffers.writable.write(transport.memory(), 0, frame)?;
            transport.finish(&pass, ticket, u32::try_from(len).unwrap_or(0));
        }
        Ok(Turn::More)
    }

    /// Reads a frame; `None` if there is none now.
    fn take_from_link(&mut self) -> Option<usize> {
        loop {
            let link = self.link.as_ref()?;
            match rustix::io::read(link, &mut self.incoming) {
                Ok(len) if len > HEADER_LEN => return Some(len),
                Ok(0) => {
                    self.unplug();
                    return None;
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return None,
                Err(errno) => {
                    tracing::debug!("network link: {errno}");
                    if matches!(errno, Errno::BADFD | Errno::NODEV) {
                        self.unplug();
                    }
                    return None;
                }
            }
        }
    }

    /// The link is gone for good; the machine goes on without.
    fn unplug(&mut self) {
        let Some(link) = self.link.take() else { return };
        tracing::warn!("network: the link is gone");
        // Others may hold it open, and then it would go on being told.
        if let Err(errno) = epoll::delete(&self.poll, link.as_fd()) {
            tracing::warn!("network: epoll: {errno}");
        }
    }

    /// Waits for frames unless one waits for the driver already.
    fn watch(&mut self) {
        let Some(link) = &self.link else { return };
        let wanted = self.held.is_none() && self.transport.active();
        if wanted != self.watches {
            let flags = if wanted { EventFlags::IN } else { EventFlags::empty() };
            match epoll::modify(&self.poll, link.as_fd(), EventData::new_u64(LINK), flags) {
                Ok(()) => self.watches = wanted,
                Err(errno) => tracing::warn!("network: epoll: {errno}"),
            }
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
/// The device without a thread, for those who play its driver.
pub(in super::super) struct Puppet {
    thread: Thread,
    link: std::os::unix::net::UnixDatagram,
}

#[cfg(any(test, feature = "fuzzing"))]
impl Puppet {
    pub(in super::super) fn new(
        transport: &Arc<Transport>,
        ours: std::os::unix::net::UnixDatagram,
        theirs: std::os::unix::net::UnixDatagram,
    ) -> Self {
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).expect("a socket's mode");
        }
        let thread = Thread::new(Arc::clone(transport), theirs.into()).expect("an epoll");
        Self { thread, link: ours }
    }

    /// Moves all that can be moved, and takes what came out of the link.
    pub(in super::super) fn step(&mut self) {
        self.thread.step();
        let mut frame = [0; HEADER_LEN];
        while self.link.recv(&mut frame).is_ok() {}
    }

    /// A frame arrives; a full link loses it.
    pub(in super::super) fn send(&self, frame: &[u8]) {
        drop(self.link.send(frame));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::super::Net;
    use super::*;
    use crate::devices::virtio::testing::{BUFFERS, Driver, WRITE};

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn device() -> (Driver, Thread, UnixDatagram) {
        let driver = Driver::new(Net::identity(MAC));
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let thread = Thread::new(Arc::clone(&driver.transport), theirs.into()).unwrap();
        (driver, thread, ours)
    }

    fn frame(byte: u8, len: usize) -> Vec<u8> {
        let mut frame = vec![0; HEADER_LEN];
        frame.extend(vec![byte; len]);
        frame
    }

    #[test]
    fn frames_go_out_however_they_are_cut() {
        let (driver, mut thread, link) = device();
        driver.put(BUFFERS, &frame(7, 60));
        driver.offer(QUEUE_SEND, 0, &[(BUFFERS, 12, 0), (BUFFERS + 12, 60, 0)]);
        driver.offer(QUEUE_SEND, 2, &[(BUFFERS, 72, 0)]);
        thread.step();
        let mut got = [0; 200];
        for _ in 0..2 {
            assert_eq!(link.recv(&mut got).unwrap(), 72);
            assert_eq!(got[..72], frame(7, 60));
        }
        assert_eq!(driver.used(QUEUE_SEND), [(0, 0), (2, 0)]);
    }

    #[test]
    fn frames_come_in_and_wait_for_buffers() {
        let (driver, mut thread, link) = device();
        for byte in 1..=3 {
            link.send(&frame(byte, 100)).unwrap();
        }
        driver.offer(QUEUE_RECEIVE, 0, &[(BUFFERS, 1600, WRITE)]);
        thread.step();
        assert_eq!(driver.used(QUEUE_RECEIVE), [(0, 112)]);
        assert_eq!(driver.get(BUFFERS + 10, 3), [1, 0, 1], "one buffer, then the frame");
        assert_eq!(thread.held, Some(112), "the second waits");
        driver.offer(
            QUEUE_RECEIVE,
            1,
            &[(BUFFERS + 2000, 12, WRITE), (BUFFERS + 3000, 200, WRITE)],
        );
        driver.offer(QUEUE_RECEIVE, 3, &[(BUFFERS + 4000, 1600, WRITE)]);
        thread.step();
        assert_eq!(driver.get(BUFFERS + 3000, 1), [2]);
        assert_eq!(driver.get(BUFFERS + 4012, 1), [3]);
    }

    #[test]
    fn what_fits_nowhere_is_lost_and_the_next_goes_on() {
        let (driver, mut thread, link) = device();
        link.send(&frame(1, 500)).unwrap();
        link.send(&frame(2, 50)).unwrap();
        driver.offer(QUEUE_RECEIVE, 0, &[(BUFFERS, 100, WRITE)]);
        // Shorter than a header, and longer than any frame.
        driver.offer(QUEUE_SEND, 0, &[(BUFFERS, 5, 0)]);
        driver.offer(QUEUE_SEND, 1, &[(BUFFERS, 1 << 20, 0)]);
        thread.step();
        assert_eq!(driver.used(QUEUE_RECEIVE), [(0, 62)]);
        assert_eq!(driver.used(QUEUE_SEND), [(0, 0), (1, 0)]);
        assert!(link.recv(&mut [0; 10]).is_err(), "nothing was sent");
        assert!(!driver.needs_reset());
    }

    #[test]
    fn a_hostile_buffer_stops_the_device() {
        let (driver, mut thread, link) = device();
        driver.offer(QUEUE_SEND, 0, &[(u64::MAX - 10, 100, 0)]);
        thread.step();
        assert!(driver.needs_reset());
        let (driver, mut thread, second) = device();
        second.send(&frame(1, 60)).unwrap();
        driver.offer(QUEUE_RECEIVE, 0, &[(0xf000_0000, 100, WRITE)]);
        thread.step();
        assert!(driver.needs_reset());
        drop((link, second));
    }

    #[test]
    fn a_link_that_goes_leaves_the_machine_running() {
        let (driver, mut thread, _link) = device();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        thread.link = Some(theirs.into());
        drop(ours);
        thread.step();
        assert!(thread.link.is_none());
        driver.put(BUFFERS, &frame(7, 60));
        driver.offer(QUEUE_SEND, 0, &[(BUFFERS, 72, 0)]);
        thread.step();
        assert_eq!(driver.used(QUEUE_SEND), [(0, 0)]);
    }
}
