//! The transport as a driver, good or bad, meets it.

use super::*;
use crate::devices::virtio::segments::Buffers;
use crate::devices::virtio::testing::{BUFFERS, Driver, INDIRECT, NEXT, WRITE, read, write};

fn identity() -> Identity {
    Identity { device: 4, features: 1 << 5, queues: &[64, 16], config: vec![1, 2, 3, 4, 5] }
}

fn take(driver: &Driver) -> Option<(Ticket, Result<Buffers, Broken>)> {
    let pass = driver.gate.enter();
    let taken = driver.transport.take(&pass, 0)?;
    Some((taken.ticket, Buffers::of(taken.chain)))
}

#[test]
fn a_driver_finds_its_device() {
    let transport = Driver::new(identity()).transport;
    assert_eq!(read(&transport, 0), 0x7472_6976);
    assert_eq!((read(&transport, 4), read(&transport, 8)), (2, 4));
    write(&transport, 0x14, 0);
    assert_eq!(read(&transport, 0x10), 1 << 5 | 1 << 28 | 1 << 29);
    write(&transport, 0x14, 1);
    assert_eq!(read(&transport, 0x10), 1);
    let mut config = [9; 4];
    transport.read(0x103, &mut config);
    assert_eq!(config, [4, 5, 0, 0], "behind the configuration there is nothing");
    write(&transport, 0x30, 7);
    assert_eq!(read(&transport, 0x34), 0, "a queue that does not exist");
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let driver = Driver::new(identity());
    for (low, high) in [(1 << 6, 1), (0, 0), (0, 3)] {
        write(&driver.transport, 0x70, 0);
        for (select, value) in [(0, low), (1, high)] {
            write(&driver.transport, 0x24, select);
            write(&driver.transport, 0x20, value);
        }
        write(&driver.transport, 0x70, 3 | 8);
        assert_eq!(read(&driver.transport, 0x70), 3, "features {low:#x} {high:#x}");
    }
}

#[test]
fn a_chain_goes_and_comes_back_with_an_interrupt() {
    let driver = Driver::new(identity());
    driver.offer(0, 3, &[(BUFFERS, 8, 0), (BUFFERS + 64, 16, WRITE)]);
    let (ticket, buffers) = take(&driver).unwrap();
    let buffers = buffers.unwrap();
    assert_eq!((buffers.readable.len(), buffers.writable.len()), (8, 16));
    let pass = driver.gate.enter();
    driver.transport.finish(&pass, ticket, 16);
    assert_eq!(driver.used(0), [(3, 16)]);
    assert_eq!(read(&driver.transport, 0x60), 1);
    assert_eq!(driver.transport.interrupt().read().unwrap(), 1);
    write(&driver.transport, 0x64, 1);
    assert_eq!(read(&driver.transport, 0x60), 0);
}

#[test]
fn an_unfinished_chain_is_saved_as_not_taken() {
    let driver = Driver::new(identity());
    driver.offer(0, 0, &[(BUFFERS, 8, 0)]);
    driver.offer(0, 1, &[(BUFFERS, 9, 0)]);
    let (first, _) = take(&driver).unwrap();
    let pass = driver.gate.enter();
    driver.transport.finish(&pass, first, 0);
    drop(pass);
    assert!(take(&driver).is_some());

    let bytes = postcard::to_stdvec(&driver.transport.save()).unwrap();
    let state: TransportState = postcard::from_bytes(&bytes).unwrap();
    let child =
        Transport::new(identity(), Arc::clone(&driver.ram), Arc::clone(&driver.gate)).unwrap();
    child.restore(&state).unwrap();
    assert_eq!(child.save(), state);
    child.send_interrupt_again();
    assert_eq!(child.interrupt().read().unwrap(), 1, "a lost interrupt is sent again");
    let pass = driver.gate.enter();
    let again = child.take(&pass, 0).expect("the unfinished chain is there again");
    assert_eq!(Buffers::of(again.chain).unwrap().readable.len(), 9);
    assert!(child.take(&pass, 0).is_none());
}

#[test]
fn a_chain_from_before_a_reset_is_forgotten() {
    let driver = Driver::new(identity());
    driver.offer(0, 0, &[(BUFFERS, 8, 0)]);
    let (ticket, _) = take(&driver).unwrap();
    write(&driver.transport, 0x70, 0);
    driver.set_available_index(0, 0);
    driver.start();
    assert!(driver.transport.is_stale(ticket));
    let pass = driver.gate.enter();
    driver.transport.finish(&pass, ticket, 8);
    assert_eq!(driver.used(0), []);
}

#[test]
fn hostile_rings_stop_the_device_and_nothing_else() {
    let ahead = Driver::new(identity());
    ahead.set_available_index(0, 1000);
    let outside = Driver::new(identity());
    outside.make_available(0, 500);
    for driver in [ahead, outside] {
        assert!(take(&driver).is_none());
        assert!(driver.needs_reset());
        assert!(take(&driver).is_none(), "it stays stopped");
        write(&driver.transport, 0x70, 0);
        driver.set_available_index(0, 0);
        driver.start();
        assert!(!driver.needs_reset());
        driver.offer(0, 0, &[(BUFFERS, 8, 0)]);
        assert!(take(&driver).is_some(), "after a reset it works again");
    }
}

#[test]
fn hostile_chains_end() {
    let driver = Driver::new(identity());
    // A loop.
    driver.describe(0, 0, (BUFFERS, 8, NEXT, 1));
    driver.describe(0, 1, (BUFFERS, 8, NEXT, 0));
    driver.make_available(0, 0);
    let (_, buffers) = take(&driver).unwrap();
    assert!(buffers.unwrap().readable.len() <= 16 * 8);
    // A readable buffer behind a writable one.
    driver.offer(0, 0, &[(BUFFERS, 8, WRITE), (BUFFERS, 8, 0)]);
    assert!(take(&driver).unwrap().1.is_err());
    // An indirect table of 65,535 descriptors.
    for index in 0..3000u64 {
        driver.describe_at(BUFFERS + 16 * index, (0, 1, NEXT, u16::try_from(index).unwrap() + 1));
    }
    driver.describe(0, 0, (BUFFERS, 65_535 * 16, INDIRECT, 0));
    driver.make_available(0, 0);
    assert!(take(&driver).unwrap().1.is_err());
    // An indirect table inside an indirect table, and one outside memory.
    driver.describe_at(BUFFERS, (BUFFERS, 16, INDIRECT, 0));
    for (address, len) in [(BUFFERS, 16), (u64::MAX - 15, 16), (BUFFERS, 7)] {
        driver.describe(0, 0, (address, len, INDIRECT, 0));
        driver.make_available(0, 0);
        assert_eq!(take(&driver).unwrap().1.unwrap(), Buffers::default());
    }
}

#[test]
fn queues_outside_memory_are_refused() {
    let driver = Driver::new(identity());
    write(&driver.transport, 0x70, 0);
    write(&driver.transport, 0x84, 0x7fff_ffff);
    write(&driver.transport, 0x44, 1);
    assert_eq!(read(&driver.transport, 0x44), 0);
    assert!(driver.needs_reset());
}

#[test]
fn a_live_queue_cannot_be_moved() {
    let driver = Driver::new(identity());
    write(&driver.transport, 0x30, 0);
    write(&driver.transport, 0x80, 0x50_0000);
    driver.offer(0, 0, &[(BUFFERS, 8, 0)]);
    assert!(take(&driver).is_some());
}

#[test]
fn accesses_of_odd_sizes_do_nothing() {
    let driver = Driver::new(identity());
    driver.transport.write(0x70, &[0]);
    driver.transport.write(0x70, &[0; 8]);
    assert!(driver.transport.active());
    let mut wide = [7; 8];
    driver.transport.read(0x70, &mut wide);
    assert_eq!(wide, [0; 8]);
}

#[test]
fn the_state_of_another_device_is_named() {
    let state = Driver::new(identity()).transport.save();
    let other = Identity { device: 2, ..identity() };
    let error = Driver::new(other).transport.restore(&state).unwrap_err().to_string();
    assert!(error.contains("the device type is 4 in the saved state, 2 here"), "{error}");
    let fewer = Identity { queues: &[64], ..identity() };
    let error = Driver::new(fewer).transport.restore(&state).unwrap_err().to_string();
    assert!(error.contains("the number of queues is 2"), "{error}");
}

#[test]
fn the_driver_is_asked_for_news_beyond_what_waits() {
    let driver = Driver::new(identity());
    driver.offer(0, 0, &[(BUFFERS, 8, 0)]);
    let pass = driver.gate.enter();
    assert_eq!(driver.transport.notify_when_more(&pass, 0).unwrap(), 1);
    driver.offer(0, 1, &[(BUFFERS, 8, 0)]);
    assert_eq!(driver.transport.notify_when_more(&pass, 0).unwrap(), 2);
}
