//! Renewal, and what is refused before it.

use coppice_agent::{ExitStatus, Identity, MIN_ENTROPY, RefusalKind};

use crate::support::{Machine, command, refusal};

fn identity(generation: u64) -> Identity {
    Identity {
        generation,
        entropy: vec![9; MIN_ENTROPY],
        realtime_ns: 1_700_000_000_000_000_000,
        hostname: "stem-1".to_owned(),
        machine_id: "0123456789abcdef0123456789abcdef".to_owned(),
        ethernet: Vec::new(),
    }
}

#[test]
fn nothing_but_ping_and_renew_is_answered_before_the_renewal() {
    let machine = Machine::new();
    let refused = |result| {
        let (kind, message) = refusal(result);
        assert_eq!(kind, RefusalKind::NotRenewed, "{message}");
    };
    let (here, there) = (machine.dir().join("here"), machine.dir().join("there"));
    std::fs::write(&here, "x").unwrap();
    refused(machine.client_of(5).run(command(&["true"]), b"").map(drop));
    refused(machine.client_of(5).put(&here, &there).map(drop));
    refused(machine.client_of(5).get(&here, &there).map(drop));
    refused(machine.client_of(5).shutdown());
    assert!(!there.exists());
    assert_eq!(machine.client_of(5).ping().unwrap(), 0);

    let mut client = machine.client_of(5);
    client.renew(&identity(5)).unwrap();
    assert_eq!(client.ping().unwrap(), 5);
    assert_eq!(client.run(command(&["true"]), b"").unwrap().status, ExitStatus::Code(0));
    let read = |name| std::fs::read_to_string(machine.dir().join("etc").join(name)).unwrap();
    assert_eq!(read("hostname"), "stem-1\n");
    assert_eq!(read("machine-id"), "0123456789abcdef0123456789abcdef\n");

    // The host of its ancestor, or of a sibling, is not its host any more.
    refused(machine.client_of(0).run(command(&["true"]), b"").map(drop));
    refused(machine.client_of(6).run(command(&["true"]), b"").map(drop));
}

#[test]
fn a_renewal_that_fails_leaves_the_machine_refusing() {
    let machine = Machine::new();
    let spoiled = Identity { hostname: "no spaces".to_owned(), ..identity(5) };
    assert_eq!(refusal(machine.client_of(5).renew(&spoiled)).0, RefusalKind::Invalid);
    assert_eq!(refusal(machine.client_of(6).renew(&identity(5))).0, RefusalKind::Invalid);
    let (kind, _) = refusal(machine.client_of(5).run(command(&["true"]), b""));
    assert_eq!(kind, RefusalKind::NotRenewed);
}

#[test]
fn a_shutdown_is_confirmed() {
    let machine = Machine::new();
    machine.client().shutdown().unwrap();
}
