//! A page server in a process of its own, which is killed again and again while
//! machines read, write, are captured and are forked.

mod refusals;

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;

use super::super::source::{PageSource, SourceError};
use super::super::{Library, Page, Script, ScriptedLibrary, Settings, serve_pages};
use super::fork::{Fork, Host, Mappable, can_fault};
use crate::host::{News, Pager, Patience, PeerError, Program};
use crate::pieces::{Piece, with_layer};
use crate::protocol::{MachineKey, PageRun, PagerEvent, PagerReply, PagerRequest, PoolId, Region};
use crate::sys::channel::Channel;
use crate::sys::userfault::Userfault;

const PAGES: u64 = 192;
/// A page that nobody has.
const LOST: u64 = 3;
/// No page server is given up.
const ENDLESS: Patience = Patience {
    ends: usize::MAX,
    within: Duration::from_secs(10),
    of_use_after: Duration::ZERO,
    ends_of_a_request: usize::MAX,
};

fn script() -> Script {
    let lost = HashSet::from([LOST]);
    let delay = Duration::from_micros(200);
    Script { zero_every: 5, frame_pages: 8, lost, delay, ..Script::plain(PAGES * 4096) }
}

/// A pack that ends whoever hears of it.
const DEADLY: u64 = 666;

/// A library with pages of a script, and with weak points.
struct Fragile(ScriptedLibrary);

impl Library for Fragile {
    fn open(&self, mut map: File) -> Result<Arc<dyn PageSource>, SourceError> {
        let mut bytes = Vec::new();
        map.rewind().and_then(|()| map.read_to_end(&mut bytes)).unwrap();
        // One that was spoilt.
        if !bytes.is_empty() {
            return Err(SourceError::NotDelivered(0));
        }
        self.0.open(map)
    }

    fn add_pack(&self, pack: u64, file: File) {
        assert_ne!(pack, DEADLY);
        self.0.add_pack(pack, file);
    }

    fn forget_packs(&self, packs: &[u64]) {
        self.0.forget_packs(packs);
    }
}

/// Not a test by itself: the process that the others kill.
#[test]
#[ignore = "the page server's process of other tests"]
fn page_server() {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let channel = Channel::new(UnixStream::from(stdin));
    serve_pages(&channel, Arc::new(Fragile(ScriptedLibrary(script()))), &Settings::default())
        .unwrap();
}

fn program() -> Program {
    let arguments = ["--exact", "fault::tests::takeover::page_server", "--ignored", "--quiet"];
    let path = std::env::current_exe().unwrap();
    Program { path, arguments: arguments.iter().map(Into::into).collect() }
}

fn start(patience: Patience) -> (Pager, mpsc::Receiver<News<PagerEvent>>) {
    let log = File::options().write(true).open("/dev/null").unwrap();
    let (sender, news) = mpsc::channel();
    let told = move |said| drop(sender.send(said));
    (Pager::spawn_with(&program(), &log, patience, told).unwrap(), news)
}

fn kills_wanted() -> u64 {
    if std::env::var_os("COPPICE_LONG").is_some() { 1000 } else { 20 }
}

/// Small numbers that look random.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// Kills each process of the page server once, some while they take over, some
/// later.
fn kill_again_and_again(pager: &Pager, wanted: u64, seed: u64) {
    let mut dice = Dice::new(seed);
    let mut last = 0;
    for _ in 0..wanted {
        while pager.pid() == last {
            std::thread::sleep(Duration::from_micros(100));
        }
        last = pager.pid();
        let most_us = if dice.below(3) == 0 { 8_000 } else { 40_000 };
        std::thread::sleep(Duration::from_micros(dice.below(most_us)));
        kill(last);
    }
}

/// A page that is nowhere zero and says which write it is.
fn stamp(number: u64) -> Page {
    let mut bytes = [0; 4096];
    bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&(number << 8).to_le_bytes()));
    bytes
}

fn open_pool(pager: &Pager, id: u64) -> Mappable {
    open_pool_with_map(pager, id).0
}

fn open_pool_with_map(pager: &Pager, id: u64) -> (Mappable, File) {
    let map = rustix::fs::memfd_create("map", MemfdFlags::CLOEXEC).unwrap();
    let memory = pager.open_pool(PoolId(id), map.as_fd()).unwrap();
    (Mappable { id, memory: Arc::new(memory) }, map.into())
}

/// A machine, and which write each of its pages must show.
struct Guest {
    key: u64,
    fork: Fork,
    pieces: Vec<Piece<Mappable>>,
    shows: Vec<Option<u64>>,
    /// Captures of it that may not be done.
    layers: Vec<u64>,
}

impl Guest {
    fn start(
        pager: &Pager,
        key: u64,
        pieces: Vec<Piece<Mappable>>,
        shows: Vec<Option<u64>>,
    ) -> Self {
        let fork = Fork::of_pieces(&pieces);
        let regions = pieces.iter().map(|piece| {
            let offset = piece.run.first * 4096;
            let address = fork.region().address + offset;
            let region = Region { address, offset, len: piece.run.count * 4096, ..fork.region() };
            (PoolId(piece.pool.id), region)
        });
        let userfault = Arc::new(fork.userfault.as_fd().try_clone_to_owned().unwrap());
        pager.attach(MachineKey(key), regions.collect(), &userfault).unwrap();
        Self { key, fork, pieces, shows, layers: Vec::new() }
    }

    fn first(pager: &Pager, base: &Mappable) -> Self {
        let shows = vec![None; usize::try_from(PAGES).unwrap()];
        Self::start(pager, 0, Piece::whole(PAGES, base.clone()), shows)
    }

    fn check(&self, script: &Script, page: u64) {
        if page == LOST {
            return;
        }
        let shown = self.shows[usize::try_from(page).unwrap()];
        let expected = shown.map_or_else(|| script.page(page), stamp);
        assert!(self.fork.read(page) == expected, "page {page} of machine {}", self.key);
    }

    fn write(&mut self, page: u64, number: u64) {
        if page != LOST {
            self.fork.write(page, &stamp(number));
            self.shows[usize::try_from(page).unwrap()] = Some(number);
        }
    }

    fn open_layer(&self, pager: &Pager, id: u64) -> Mappable {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let memory = File::open("/proc/self/mem").unwrap();
        let Region { address, len, .. } = self.fork.region();
        let descriptors = [pagemap.as_fd(), memory.as_fd()];
        let range = address..address + len;
        let memory = pager.open_layer(PoolId(id), MachineKey(self.key), &range, descriptors);
        Mappable { id, memory: Arc::new(memory.unwrap()) }
    }
}

/// What a captured page must be, and whether it is.
fn check_layer(layer: &Mappable, runs: &[PageRun], shows: &[Option<u64>]) {
    let file = File::from(layer.memory.try_clone().unwrap());
    let mut found = 0;
    for page in runs.iter().flat_map(|run| run.first..run.first + run.count) {
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, page * 4096).unwrap();
        let number = shows[usize::try_from(page).unwrap()].expect("a page that was written");
        assert!(bytes == stamp(number), "page {page} of layer {}", layer.id);
        found += 1;
    }
    assert_eq!(found, shows.iter().flatten().count(), "pages of layer {}", layer.id);
}

/// Reads and writes until the end. Between two steps others may look.
fn work(guest: &Mutex<Guest>, stop: &AtomicBool, writes: &AtomicU64, seed: u64) {
    let (script, mut dice) = (script(), Dice::new(seed));
    while !stop.load(Ordering::Relaxed) {
        let mut guest = guest.lock().unwrap();
        for _ in 0..8 {
            let page = dice.below(PAGES);
            if dice.below(3) == 0 {
                let number = writes.fetch_add(1, Ordering::Relaxed) + 1;
                guest.write(page, number);
            } else {
                guest.check(&script, page);
            }
        }
        drop(guest);
        std::thread::sleep(Duration::from_micros(dice.below(300)));
    }
}

/// A child of a machine that works, as it was at one instant.
struct Branch {
    child: Guest,
    layer: Mappable,
    runs: Vec<PageRun>,
    /// What the machine showed at that instant.
    shows: Vec<Option<u64>>,
}

fn branch(pager: &Pager, parent: &Mutex<Guest>, id: u64) -> Branch {
    let layer = parent.lock().unwrap().open_layer(pager, id);
    let mut stopped = parent.lock().unwrap();
    pager.freeze(PoolId(id), u64::MAX).unwrap();
    let (shows, below) = (stopped.shows.clone(), stopped.pieces.clone());
    stopped.layers.push(id);
    drop(stopped);
    let runs = pager.layer_runs(PoolId(id)).unwrap();
    let pieces = with_layer(&below, &runs, &layer, PAGES, 12);
    let child = Guest::start(pager, id, pieces, shows.clone());
    Branch { child, layer, runs, shows }
}

/// Lets a machine end.
fn retire(pager: &Pager, guest: Arc<Mutex<Guest>>) {
    let guest = Arc::into_inner(guest).expect("nobody works with it").into_inner().unwrap();
    guest.layers.iter().for_each(|layer| pager.wait_for_layer(PoolId(*layer)).unwrap());
    pager.detach(MachineKey(guest.key)).unwrap();
}

/// Random histories of machines that are forked while they work.
struct History<'a> {
    pager: &'a Pager,
    guests: Vec<Arc<Mutex<Guest>>>,
    writes: Arc<AtomicU64>,
    dice: Dice,
    next: u64,
}

impl History<'_> {
    /// Forks some of the machines while all of them work.
    fn go_on(&mut self) {
        let stop = AtomicBool::new(false);
        let mut children = Vec::new();
        std::thread::scope(|scope| {
            for guest in self.guests.clone() {
                let (stop, writes) = (&stop, Arc::clone(&self.writes));
                let seed = self.dice.below(1 << 40);
                scope.spawn(move || work(&guest, stop, &writes, seed));
            }
            // A failure must not leave the others at work for ever.
            let forked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let forks = (0..3).map(|_| self.fork()).collect::<Vec<_>>();
                children.extend(forks);
            }));
            stop.store(true, Ordering::Relaxed);
            forked.unwrap();
        });
        self.guests.extend(children.into_iter().map(|child| Arc::new(Mutex::new(child))));
    }

    fn fork(&mut self) -> Guest {
        let count = self.guests.len() as u64;
        let parent = Arc::clone(&self.guests[usize::try_from(self.dice.below(count)).unwrap()]);
        self.next += 1;
        let Branch { child, layer, runs, shows } = branch(self.pager, &parent, self.next);
        (0..PAGES).for_each(|page| child.check(&script(), page));
        if self.dice.below(2) == 0 {
            self.pager.wait_for_layer(PoolId(layer.id)).unwrap();
            // What its machine has from a layer below is not in this one.
            let own: Vec<_> =
                runs.iter().flat_map(|run| run.first..run.first + run.count).collect();
            for page in own {
                let shown = shows[usize::try_from(page).unwrap()].expect("a page that was written");
                assert!(stored(&layer, page) == stamp(shown), "page {page} of layer {}", layer.id);
            }
        }
        child
    }

    fn thin_out(&mut self) {
        while self.guests.len() > 8 {
            let at = usize::try_from(self.dice.below(self.guests.len() as u64)).unwrap();
            retire(self.pager, self.guests.swap_remove(at));
        }
    }
}

/// What a file has at a page, without a mapping.
fn stored(memory: &Mappable, page: u64) -> Page {
    let file = File::from(memory.memory.try_clone().unwrap());
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, page * 4096).unwrap();
    bytes
}

fn history(seed: u64, kills: u64) -> (u64, u64) {
    let (pager, _news) = start(ENDLESS);
    let base = open_pool(&pager, 0);
    let guests = vec![Arc::new(Mutex::new(Guest::first(&pager, &base)))];
    let (writes, dice) = (Arc::default(), Dice::new(seed));
    let mut history = History { pager: &pager, guests, writes, dice, next: 0 };
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| kill_again_and_again(&pager, kills, seed * 7919));
        while !killer.is_finished() {
            history.go_on();
            history.thin_out();
        }
    });
    for guest in &history.guests {
        let guest = guest.lock().unwrap();
        (0..PAGES).for_each(|page| guest.check(&script(), page));
    }
    (pager.takeovers(), history.writes.load(Ordering::Relaxed))
}

#[test]
fn no_byte_is_wrong_however_often_the_page_server_is_killed() {
    if !can_fault() {
        return;
    }
    let (mut kills, mut takeovers, mut writes) = (0, 0, 0);
    for seed in 1.. {
        if kills == kills_wanted() {
            break;
        }
        let now = (kills_wanted() - kills).min(50);
        let told = history(seed, now);
        (kills, takeovers, writes) = (kills + now, takeovers + told.0, writes + told.1);
    }
    eprintln!("tried: {kills} kills of a page server, {takeovers} takeovers, {writes} writes");
    assert!(takeovers > 0);
}

/// Captures that overlap, each with a kill in its middle, and what they hold is
/// given back.
#[test]
fn a_capture_is_one_instant_whoever_ends_it() {
    if !can_fault() {
        return;
    }
    let (pager, _news) = start(ENDLESS);
    let base = open_pool(&pager, 0);
    let guest = Mutex::new(Guest::first(&pager, &base));
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| work(&guest, &stop, &writes, 1));
        let captured = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..10 {
                let ids = [round * 2 + 1, round * 2 + 2];
                let captures = ids.map(|id| {
                    let layer = guest.lock().unwrap().open_layer(&pager, id);
                    let stopped = guest.lock().unwrap();
                    pager.freeze(PoolId(id), u64::MAX).unwrap();
                    (layer, stopped.shows.clone())
                });
                std::thread::sleep(Duration::from_micros(round * 400));
                kill(pager.pid());
                for (layer, shows) in captures {
                    let runs = pager.layer_runs(PoolId(layer.id)).unwrap();
                    pager.wait_for_layer(PoolId(layer.id)).unwrap();
                    check_layer(&layer, &runs, &shows);
                    pager.close_pool(PoolId(layer.id)).unwrap();
                }
            }
        }));
        stop.store(true, Ordering::Relaxed);
        captured.unwrap();
    });
    assert_eq!(pager.takeovers(), 10);
    let stats = pager.stats().unwrap().0;
    assert_eq!(stats.len(), 1, "{stats:?}");
    let at = stats[0].1;
    assert_eq!(at.resident_pages, at.stored_pages + at.zero_pages);
}

/// A page that was lost in one life is lost in the next, for the machine that
/// it stopped and for others.
#[test]
fn a_lost_page_stays_lost() {
    if !can_fault() || !Userfault::can_poison() {
        return;
    }
    let (pager, news) = start(ENDLESS);
    let base = open_pool(&pager, 0);
    let first = Guest::first(&pager, &base);
    let lost = |key: u64| match news.recv_timeout(Duration::from_secs(60)).unwrap() {
        News::Event(PagerEvent::PageLost { machine, page, error, .. }) => {
            assert_eq!((machine, page), (MachineKey(key), LOST), "{error}");
        }
        other => panic!("{other:?}"),
    };
    first.fork.read_by_system_call(LOST).unwrap_err();
    lost(0);
    kill(pager.pid());
    first.fork.read_by_system_call(LOST).unwrap_err();
    let pieces = Piece::whole(PAGES, base.clone());
    let second = Guest::start(&pager, 1, pieces, first.shows.clone());
    second.fork.read_by_system_call(LOST).unwrap_err();
    lost(1);
    for page in 0..PAGES {
        first.check(&script(), page);
        second.check(&script(), page);
    }
}

#[test]
fn a_capture_that_is_done_is_not_begun_again() {
    if !can_fault() {
        return;
    }
    let (pager, _news) = start(ENDLESS);
    let base = open_pool(&pager, 0);
    let mut guest = Guest::first(&pager, &base);
    (0..64).for_each(|page| guest.write(page * 3, page + 1));
    let layer = guest.open_layer(&pager, 1);
    pager.freeze(PoolId(1), u64::MAX).unwrap();
    pager.wait_for_layer(PoolId(1)).unwrap();
    kill(pager.pid());
    // What is done is not begun again.
    (0..64).for_each(|page| guest.write(page * 3, page + 1000));
    pager.wait_for_layer(PoolId(1)).unwrap();
    assert!(stored(&layer, 6) == stamp(3));
    let runs = pager.layer_runs(PoolId(1)).unwrap();
    let pieces = with_layer(&guest.pieces, &runs, &layer, PAGES, 12);
    let mut shows = vec![None; usize::try_from(PAGES).unwrap()];
    (0..64).filter(|page| page * 3 != LOST).for_each(|page| {
        shows[usize::try_from(page * 3).unwrap()] = Some(page + 1);
    });
    let child = Guest::start(&pager, 2, pieces, shows);
    (0..PAGES).for_each(|page| child.check(&script(), page));
}

/// The machine wrote on after a page of it could not be copied. Its bytes are
/// not those of the instant any more.
#[test]
fn what_was_lost_is_not_copied_by_the_next_one() {
    if !can_fault() {
        return;
    }
    let map = File::from(rustix::fs::memfd_create("map", MemfdFlags::CLOEXEC).unwrap());
    let dying = Host::new(script());
    let (_, mut pool) = dying.call(&PagerRequest::OpenPool { pool: PoolId(1) }, &[map.as_fd()]);
    let fork = dying.fork(7, 1, &pool.remove(0));
    (0..8).for_each(|page| fork.write(page * 2, &stamp(page)));
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let memory = File::open("/proc/self/mem").unwrap();
    let (layer, machine) = (PoolId(2), MachineKey(7));
    let Region { address, len, .. } = fork.region();
    let open = PagerRequest::OpenLayer { layer, machine, address, len };
    // A file without a byte takes the place of the machine's memory.
    let (reply, files) = dying.call(&open, &[pagemap.as_fd(), map.as_fd()]);
    assert_eq!(reply, Ok(PagerReply::Layer));
    assert_eq!(dying.freeze(2), 8);
    let lost = PagerEvent::LayerDone { layer, error: Some("it could not be copied".to_owned()) };
    let event = dying.event();
    assert!(matches!(event, PagerEvent::LayerDone { error: Some(_), .. }), "{event:?}");
    drop(dying);

    let next = Host::new(script());
    let adopt = PagerRequest::AdoptPool { pool: PoolId(1) };
    assert_eq!(next.call(&adopt, &[map.as_fd(), pool[0].as_fd()]).0, Ok(PagerReply::Done));
    let below = vec![(PageRun { first: 0, count: PAGES }, PoolId(1))];
    let adopt = PagerRequest::AdoptLayer { layer, len, below, frozen: true, lost: None };
    let [shown, memfd, record] = <[OwnedFd; 3]>::try_from(files).unwrap();
    assert_eq!(next.call(&adopt, &[memfd.as_fd(), record.as_fd()]).0, Ok(PagerReply::Done));
    assert_eq!(next.runs(2).len(), 8);
    let adopt = PagerRequest::AdoptMachine {
        machine,
        regions: vec![(PoolId(1), fork.region())],
        memory: Some((address, len)),
        layers: vec![layer],
    };
    let descriptors = [fork.userfault.as_fd(), pagemap.as_fd(), memory.as_fd()];
    assert_eq!(next.call(&adopt, &descriptors).0, Ok(PagerReply::Done));
    assert_eq!(next.event(), lost);
    let shown = Mappable { id: 2, memory: Arc::new(shown) };
    assert!((0..PAGES).all(|page| stored(&shown, page) == [0; 4096]));
    // It goes on, and nobody waits.
    fork.write(4, &stamp(99));
    assert!(fork.read(5) == script().page(5));
}

#[test]
fn one_that_ends_over_and_over_is_given_up() {
    let log = File::options().write(true).open("/dev/null").unwrap();
    let (sender, news) = mpsc::channel();
    let told = move |said| drop(sender.send(said));
    let program = Program { path: PathBuf::from("/bin/false"), arguments: Vec::new() };
    let begun = Instant::now();
    let pager = Pager::spawn(&program, &log, told).unwrap();
    let error = pager.stats().unwrap_err();
    assert!(matches!(error, PeerError::Gone { .. }), "{error}");
    let closed = news.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(matches!(closed, News::Closed), "{closed:?} after {:?}", begun.elapsed());
    assert!(matches!(pager.wait_for_layer(PoolId(9)), Err(PeerError::Gone { .. }) | Ok(())));
    assert_eq!(pager.takeovers(), 0);
}
