//! The threads that answer faults.
//!
//! All of them wait on one epoll descriptor, edge-triggered, so the kernel
//! gives each burst of faults to one idle thread without any hand-over in
//! user space. That thread empties the userfaultfd, answers at once what
//! needs no fetch, makes one fetch itself and nudges others to make the rest.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::event::{EventfdFlags, epoll, eventfd};
use userfaultfd::EventBuffer;

use super::machine::{Machine, Waiter};
use super::outbox::Outbox;
use super::pool::{Arrival, Pool};
use super::queue::{Job, Queue};
use super::source::SourceError;
use crate::protocol::{MachineKey, PAGE_SIZE, PagerEvent, PoolId};
use crate::sys::userfault::Fault;

/// Stands for the nudge among the machine keys.
pub(super) const NUDGE: u64 = u64::MAX;

/// What is added to the nudge's counter, as x86-64 lays it out.
const NUDGE_ONE: [u8; 8] = 1_u64.to_le_bytes();

/// Faults read in one go.
const BURST: usize = 64;

/// What the workers share with the server that controls them.
#[derive(Debug)]
pub(super) struct Shared {
    epoll: OwnedFd,
    nudge: OwnedFd,
    pub(super) machines: RwLock<HashMap<MachineKey, Arc<Machine>>>,
    queue: Queue,
    pub(super) outbox: Outbox,
    can_poison: bool,
    stop: AtomicBool,
}

impl Shared {
    pub(super) fn new(workers: usize, outbox: Outbox, can_poison: bool) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let nudge = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &nudge, epoll::EventData::new_u64(NUDGE), flags)?;
        let queue = Queue::new(workers.saturating_sub(1));
        let stop = AtomicBool::new(false);
        Ok(Self { epoll, nudge, machines: RwLock::default(), queue, outbox, can_poison, stop })
    }

    /// Serves a machine from now on, including faults that wait already.
    pub(super) fn attach(&self, machine: Arc<Machine>) -> io::Result<()> {
        let key = machine.key;
        let mut machines = self.machines.write().unwrap_or_else(PoisonError::into_inner);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &machine.userfault, epoll::EventData::new_u64(key.0), flags)?;
        machines.insert(key, machine);
        Ok(())
    }

    /// Forgets a machine.
    pub(super) fn detach(&self, key: MachineKey) -> Option<Arc<Machine>> {
        let mut machines = self.machines.write().unwrap_or_else(PoisonError::into_inner);
        let machine = machines.remove(&key)?;
        machine.gone.store(true, Ordering::Relaxed);
        let _gone = epoll::delete(&self.epoll, &machine.userfault);
        Some(machine)
    }

    /// Whether faults wait for a thread that could fetch for them.
    pub(super) fn is_behind(&self) -> bool {
        self.queue.is_behind()
    }

    /// Has a worker fetch what somebody waits for.
    pub(super) fn hand_over(&self, job: Job) {
        self.queue.push(job);
        self.nudge();
    }

    /// Whether all is to end.
    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Makes the workers end, each when its fetch is over.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.nudge();
    }

    /// Wakes an idle worker. Each write is an edge of its own, so the counter
    /// is never read; at its limit the last edge is still to be taken.
    fn nudge(&self) {
        let _full = rustix::io::write(&self.nudge, &NUDGE_ONE);
    }

    /// The life of a worker.
    pub(super) fn run(&self) {
        let mut buffer = EventBuffer::new(BURST);
        let mut event: [epoll::Event; 1] = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }];
        loop {
            match epoll::wait(&self.epoll, &mut event, None) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                // The descriptor is ours and open: this cannot happen.
                Err(errno) => panic!("epoll_wait: {errno}"),
            }
            if self.stop.load(Ordering::SeqCst) {
                return self.nudge();
            }
            match event[0].data.u64() {
                NUDGE => self.work(self.queue.take()),
                key => self.answer(MachineKey(key), &mut buffer),
            }
        }
    }

    fn answer(&self, key: MachineKey, buffer: &mut EventBuffer) {
        let machine = {
            let machines = self.machines.read().unwrap_or_else(PoisonError::into_inner);
            machines.get(&key).cloned()
        };
        let Some(machine) = machine else {
            return;
        };
        let mut own = None;
        loop {
            let sink = &mut |fault: Fault| {
                if let Some(job) = self.fault(&machine, fault) {
                    match own {
                        None => own = Some(job),
                        Some(_) => self.hand_over(job),
                    }
                }
            };
            // Fewer than asked for means that none was left. An error means
            // that the machine is gone; the supervisor detaches it.
            match machine.userfault.faults(buffer, sink) {
                Ok(count) if count == BURST => {}
                Ok(_) | Err(_) => break,
            }
        }
        self.work(own.and_then(|job| self.queue.start(job)));
    }

    /// Answers a fault at once, or says what has to be fetched.
    fn fault(&self, machine: &Arc<Machine>, fault: Fault) -> Option<Job> {
        machine.faults.fetch_add(1, Ordering::Relaxed);
        let address = fault.address & !(PAGE_SIZE - 1);
        if fault.protected {
            machine.release(address);
            return None;
        }
        let Some((pool, page)) = machine.find(address) else {
            self.lose_stray(machine, address);
            return None;
        };
        let waiter = Waiter { machine: Arc::clone(machine), address, page };
        match pool.arrive(&waiter) {
            Arrival::Resident => waiter.wake(),
            Arrival::Zeros => {
                machine.touched.note(pool.id(), page);
                match pool.install_zeros(page, Some(machine)) {
                    Ok(()) => waiter.wake(),
                    Err(error) => self.lose(pool.id(), &[waiter], &error.to_string()),
                }
            }
            Arrival::Joined => {
                machine.touched.note(pool.id(), page);
                machine.store_faults.fetch_add(1, Ordering::Relaxed);
            }
            Arrival::Fetch(frame) => {
                machine.touched.note(pool.id(), page);
                machine.store_faults.fetch_add(1, Ordering::Relaxed);
                return Some(Job { pool: Arc::clone(pool), frame, page, machine: waiter.machine });
            }
        }
        None
    }

    /// Runs a job for which leave was given, and then what waits.
    fn work(&self, first: Option<Job>) {
        let mut next = first;
        while let Some(job) = next {
            self.fetch(&job);
            next = self.queue.finish();
        }
    }

    /// Fetches until nobody waits for a page of the frame. Each round decides
    /// at least one page that is waited for.
    fn fetch(&self, job: &Job) {
        let mut page = Some(job.page);
        while let Some(wanted) = page {
            let result = fetch_guarded(&job.pool, job, wanted);
            let lost = result.is_err().then_some(wanted);
            let settled = job.pool.settle(job.frame, lost);
            settled.woken.iter().for_each(Waiter::wake);
            if let Err(error) = result {
                self.lose(job.pool.id(), &settled.lost, &error.to_string());
            }
            page = settled.next;
        }
    }

    /// Poisons a page in the machines that need it, and says so.
    fn lose(&self, pool: PoolId, waiters: &[Waiter], error: &str) {
        for Waiter { machine, address, page } in waiters {
            let (key, page, error) = (machine.key, *page, error.to_owned());
            let event = PagerEvent::PageLost { machine: key, pool, page, error };
            self.say_and_poison(event, machine, *address);
        }
    }

    /// A fault where no pool is: nothing can be said to be right there.
    fn lose_stray(&self, machine: &Arc<Machine>, address: u64) {
        if let Some(pool) = machine.any_pool() {
            let event = PagerEvent::PageLost {
                machine: machine.key,
                pool,
                page: u64::MAX,
                error: format!("address {address:#x} belongs to none of the machine's pools"),
            };
            self.say_and_poison(event, machine, address);
        }
    }

    /// Poisons a page once the supervisor is sure to hear of it: nobody asks for
    /// a poisoned page again, so no later page server would find it lost. Where
    /// the kernel cannot poison, the thread waits until the supervisor ends the
    /// machine.
    fn say_and_poison(&self, event: PagerEvent, machine: &Arc<Machine>, address: u64) {
        let (machine, can_poison) = (Arc::clone(machine), self.can_poison);
        self.outbox.event_then(event, move || {
            if can_poison {
                // It fails only if the machine is gone.
                drop(machine.userfault.poison(address, PAGE_SIZE));
            }
        });
    }
}

/// A bug in a source must not leave its waiters without an answer.
fn fetch_guarded(pool: &Pool, job: &Job, page: u64) -> Result<(), SourceError> {
    let fetch = || pool.fetch(job.frame, page, Some(&job.machine));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(fetch))
        .unwrap_or(Err(SourceError::NotDelivered(page)))
}
