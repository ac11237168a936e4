//! Peers that do not keep to the protocol.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use coppice_agent::{
    Exec, MAX_FRAME, RefusalKind, Reply, Request, VERSION, decode, encode, read_frame,
};

use crate::support::{Machine, command};

fn talk(machine: &Machine, bytes: &[u8]) -> Vec<u8> {
    let mut stream: UnixStream = machine.connect();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // The agent may hang up before it has read all of the garbage.
    let _sent = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer);
    answer
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let machine = Machine::new();
    let hello = |version| {
        let mut wire = Vec::new();
        encode(&Request::Hello { version, generation: 0 }, b"", &mut wire).unwrap();
        wire
    };
    let oversize = u32::try_from(MAX_FRAME + 1).unwrap().to_le_bytes();
    assert!(talk(&machine, &oversize).is_empty());
    assert!(talk(&machine, b"GET / HTTP/1.1\r\n\r\n").is_empty());
    assert!(talk(&machine, &[5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff]).is_empty());
    assert!(talk(&machine, &[hello(VERSION), oversize.to_vec()].concat()).is_empty());
    let mut early = Vec::new();
    encode(&Request::Ping, b"", &mut early).unwrap();
    assert!(talk(&machine, &early).is_empty(), "no greeting, no answer");

    let answer = talk(&machine, &hello(VERSION + 1));
    let mut body = Vec::new();
    read_frame(&mut &answer[..], &mut body).unwrap();
    let (reply, _) = decode::<Reply>(&body).unwrap();
    assert!(matches!(reply, Reply::Refused { kind: RefusalKind::Invalid, .. }));

    assert_eq!(machine.client().ping().unwrap(), 0, "the next connection is served");
}

#[test]
fn input_beyond_the_credit_ends_the_connection() {
    let machine = Machine::new();
    let mut wire = Vec::new();
    encode(&Request::Hello { version: VERSION, generation: 0 }, b"", &mut wire).unwrap();
    let exec = Exec { stdin: true, ..command(&["sleep", "1000"]) };
    encode(&Request::Exec(exec), b"", &mut wire).unwrap();
    for _ in 0..64 {
        encode(&Request::Stdin, &[0; 16 << 10], &mut wire).unwrap();
    }
    // What matters is that this returns: the agent hangs up and kills.
    drop(talk(&machine, &wire));
}
