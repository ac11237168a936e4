//! A machine on a network: a tap device on the host, a server in the guest
//! that goes on in the forks, each with an address of its own.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use coppice_tests::{Coppice, Guest, guest};
use serde_json::Value;

/// Of the range that is kept for tests of networks, RFC 2544.
const HOST: &str = "198.18.77.1/24";
const SERVER: &str = "198.18.77.2:7000";

/// Gives the guest its address, then answers each stream with its bytes and
/// with how many streams there were.
const SCRIPT: &str = r#"
import fcntl, os, socket, struct
control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def address(text):
    return struct.pack("16sHH4s8x", b"eth0", socket.AF_INET, 0, socket.inet_aton(text))
fcntl.ioctl(control, 0x8916, address("198.18.77.2"))
fcntl.ioctl(control, 0x891C, address("255.255.255.0"))
fcntl.ioctl(control, 0x8914, struct.pack("16sH22x", b"eth0", 1))
server = socket.create_server(("0.0.0.0", 7000))
if os.fork():
    os._exit(0)
os.setsid()
for descriptor in range(3):
    os.dup2(os.open("/dev/null", os.O_RDWR), descriptor)
count = 0
while True:
    stream, _ = server.accept()
    count += 1
    got = b""
    while part := stream.recv(65536):
        got += part
    stream.sendall(got + b"%d" % count)
    stream.close()
"#;

#[test]
fn machines_and_their_forks_on_a_network() {
    let Some(guest) = guest() else { return };
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/net/tun").exists() {
        eprintln!("skipped: tap devices need root and /dev/net/tun");
        return;
    }
    let coppice = Coppice::new().unwrap();
    start(&coppice, &guest);
    coppice.text(&["exec", "web", "--", "python3", "-c", SCRIPT]).unwrap();
    let parent = net(&coppice, "web");
    ip(&["addr", "add", HOST, "dev", parent["tap"].as_str().unwrap()]);
    let all: Vec<u8> = (0..50_000u32).flat_map(u32::to_le_bytes).collect();
    for count in ["1", "2"] {
        assert_eq!(talk(&all), [all.as_slice(), count.as_bytes()].concat());
    }
    assert_eq!(address_in_guest(&coppice, "web"), parent["mac"]);

    coppice.text(&["snapshot", "web", "--name", "serving"]).unwrap();
    assert_eq!(coppice.json(&["show", "serving"]).unwrap()["machine"]["nets"], 1);
    coppice.text(&["stop", "web", "--kill"]).unwrap();
    wait_until("the tap device goes with its machine", || !there(&parent["tap"]));
    coppice.text(&["fork", "serving", "--count", "2", "--name", "fork"]).unwrap();
    let forks = [net(&coppice, "fork-1"), net(&coppice, "fork-2")];
    for (name, fork) in ["fork-1", "fork-2"].iter().zip(&forks) {
        // What was counted in memory goes on, at another ethernet address, and
        // is on no network before it has that.
        wait_until("the fork is plugged in", || is_up(&fork["tap"]));
        ip(&["addr", "add", HOST, "dev", fork["tap"].as_str().unwrap()]);
        assert_eq!(talk(b"again "), b"again 3");
        ip(&["addr", "del", HOST, "dev", fork["tap"].as_str().unwrap()]);
        assert_eq!(address_in_guest(&coppice, name), fork["mac"]);
    }
    assert_ne!(forks[0]["mac"], forks[1]["mac"]);
    assert_ne!(forks[0]["mac"], parent["mac"]);
    mistakes(&coppice);
    bridges(&coppice);
}

fn start(coppice: &Coppice, guest: &Guest) {
    coppice.text(&["import", guest.disk.to_str().unwrap(), "--name", "root"]).unwrap();
    let kernel = guest.kernel.to_str().unwrap();
    let run = ["run", "--name", "web", "--kernel", kernel, "--disk", "root", "--net", "tap"];
    coppice.text(&run).unwrap();
}

fn net(coppice: &Coppice, machine: &str) -> Value {
    let all = coppice.json(&["ps"]).unwrap();
    let machines = all["machines"].as_array().unwrap();
    machines.iter().find(|line| line["name"] == machine).unwrap()["nets"][0].clone()
}

fn address_in_guest(coppice: &Coppice, machine: &str) -> String {
    let path = "/sys/class/net/eth0/address";
    coppice.text(&["exec", machine, "--", "cat", path]).unwrap().trim().to_owned()
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {arguments:?}");
}

fn there(tap: &Value) -> bool {
    Path::new("/sys/class/net").join(tap.as_str().unwrap()).exists()
}

/// The first bit of an interface's flags.
fn is_up(tap: &Value) -> bool {
    let path = Path::new("/sys/class/net").join(tap.as_str().unwrap()).join("flags");
    let flags = std::fs::read_to_string(path).unwrap_or_default();
    flags.trim().ends_with(['1', '3', '5', '7', '9', 'b', 'd', 'f'])
}

/// What the server answers.
fn talk(bytes: &[u8]) -> Vec<u8> {
    let server = SERVER.parse().unwrap();
    let limit = Duration::from_secs(120);
    let mut stream = TcpStream::connect_timeout(&server, limit).unwrap();
    stream.set_read_timeout(Some(limit)).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

fn mistakes(coppice: &Coppice) {
    let line = coppice.refusal(&["fork", "serving", "--net", "tap", "--net", "tap"]).unwrap();
    assert!(line.contains("captured with 1 network devices"), "{line}");
    let line = coppice.refusal(&["fork", "serving", "--net", "bridge:no-such-one"]).unwrap();
    assert!(line.contains("bridge:no-such-one"), "{line}");
    let line = coppice.refusal(&["fork", "serving", "--count", "2", "--net", "tap:cop0"]).unwrap();
    assert!(line.contains("cannot share the tap device cop0"), "{line}");
    assert_eq!(coppice.run(&["fork", "serving", "--net", "br0"]).unwrap().status.code(), Some(2));
}

fn bridges(coppice: &Coppice) {
    let bridge = format!("copbr{}", std::process::id());
    let made = Command::new("ip").args(["link", "add", &bridge, "type", "bridge"]).status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no bridges on this host");
        return;
    }
    let place = format!("bridge:{bridge}");
    let forked = coppice.text(&["fork", "serving", "--name", "crossed", "--net", &place]);
    let master = |machine: &str| {
        let tap = net(coppice, machine)["tap"].as_str().unwrap().to_owned();
        let link = std::fs::read_link(Path::new("/sys/class/net").join(tap).join("master"));
        link.unwrap().file_name().unwrap().to_str().unwrap().to_owned()
    };
    let found = forked.map(|_| {
        coppice.text(&["fork", "crossed", "--name", "below"]).unwrap();
        [master("crossed"), master("below")]
    });
    ip(&["link", "del", &bridge]);
    assert_eq!(found.unwrap(), [bridge.clone(), bridge]);
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
