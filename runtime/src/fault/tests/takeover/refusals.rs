//! What one request, one pool or one machine can cost: itself.

use std::io::Write;

use super::*;
use crate::protocol::PagerMessage;

#[test]
fn a_request_that_ends_them_is_refused_and_the_next_one_goes_on() {
    if !can_fault() {
        return;
    }
    let (pager, _news) = start(Patience::default());
    let base = open_pool(&pager, 0);
    let mut guest = Guest::first(&pager, &base);
    guest.write(7, 70);
    let file = File::open("/dev/null").unwrap();
    let error = pager.add_pack(DEADLY, file.as_fd()).unwrap_err();
    assert!(matches!(error, PeerError::Refused { .. }), "{error}");
    (0..PAGES).for_each(|page| guest.check(&script(), page));
    pager.add_pack(1, file.as_fd()).unwrap();
    assert_eq!(pager.takeovers(), 2);
}

/// A pool that the next one cannot open costs its machines and nothing else, and
/// what waited for them goes on.
#[test]
fn a_machine_that_is_refused_is_let_go_and_no_other() {
    if !can_fault() {
        return;
    }
    let (pager, news) = start(ENDLESS);
    let base = open_pool(&pager, 0);
    let other = Guest::first(&pager, &base);
    let (spoilt, mut map) = open_pool_with_map(&pager, 1);
    let shows = other.shows.clone();
    let guest = Guest::start(&pager, 1, Piece::whole(PAGES, spoilt), shows);
    let _layer = guest.open_layer(&pager, 2);
    map.write_all(b"spoilt").unwrap();
    kill(pager.pid());
    match news.recv_timeout(Duration::from_secs(60)).unwrap() {
        News::Event(PagerEvent::PageLost { machine, error, .. }) => {
            assert_eq!(machine, MachineKey(1), "{error}");
        }
        heard => panic!("{heard:?}"),
    }
    let lost = pager.wait_for_layer(PoolId(2)).unwrap_err();
    assert!(matches!(lost, PeerError::Refused { .. }), "{lost}");
    (0..PAGES).for_each(|page| other.check(&script(), page));
    assert!(pager.has_pool(PoolId(0)) && !pager.has_pool(PoolId(1)));
    pager.detach(MachineKey(1)).unwrap_err();
    pager.close_pool(PoolId(2)).unwrap();
    pager.close_pool(PoolId(1)).unwrap();
    // Nothing of it is told to the next one.
    kill(pager.pid());
    let (pools, machines) = pager.stats().unwrap();
    assert_eq!((pools.len(), machines.len()), (1, 1));
    assert!(news.try_recv().is_err());
}

/// What a machine had freed is zero for its children, and the budget holds, also
/// with the next one.
#[test]
fn freed_pages_and_the_budget_are_taken_over() {
    if !can_fault() {
        return;
    }
    let (pager, _news) = start(ENDLESS);
    let base = open_pool(&pager, 0);
    let mut guest = Guest::first(&pager, &base);
    (0..8).for_each(|page| guest.write(page * 4, page + 1));
    let layer = guest.open_layer(&pager, 1);
    pager.freeze(PoolId(1), u64::MAX).unwrap();
    pager.clear_layer(PoolId(1), vec![PageRun { first: 0, count: 32 }]).unwrap();
    pager.set_budget(16 * 4096).unwrap();
    kill(pager.pid());
    let child = Guest::start(&pager, 2, Piece::whole(PAGES, layer), guest.shows.clone());
    for page in (0..PAGES).filter(|page| *page != LOST) {
        if page < 32 && page % 4 != 0 {
            assert!(child.fork.read(page) == [0; 4096], "page {page}");
        } else {
            child.check(&script(), page);
        }
        guest.check(&script(), page);
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while pager.stats().unwrap().0[0].1.evicted_pages == 0 {
        assert!(Instant::now() < deadline, "no page was dropped");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_request_that_lost_its_descriptors_is_refused_and_the_next_one_answered() {
    let (near, far) = Channel::pair().unwrap();
    let server = std::thread::spawn(move || {
        serve_pages(&far, Arc::new(ScriptedLibrary(script())), &Settings::default()).unwrap();
    });
    let body = postcard::to_stdvec(&PagerRequest::AddPack { pack: 1 }).unwrap();
    let mut socket = near.socket();
    socket.write_all(&u32::try_from(body.len()).unwrap().to_le_bytes()).unwrap();
    socket.write_all(&1u32.to_le_bytes()).unwrap();
    socket.write_all(&body).unwrap();
    near.send(&PagerRequest::Stats, &[]).unwrap();
    let (refused, answered) = (near.receive().unwrap().0, near.receive().unwrap().0);
    assert!(matches!(refused, PagerMessage::Reply(Err(_))), "{refused:?}");
    assert!(matches!(answered, PagerMessage::Reply(Ok(_))), "{answered:?}");
    drop(near);
    server.join().unwrap();
}
