//! The agent and its client, joined by a socket pair on the host.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use coppice_agent::{
    Captured, ClientError, Exec, ExecEvent, ExitStatus, Identity, MAX_FRAME, MIN_ENTROPY,
    RefusalKind, Reply, Request, VERSION, WindowSize, decode, encode, read_frame,
};
use support::{Machine, command, shell};

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (RefusalKind, String) {
    match result.unwrap_err() {
        ClientError::Refused { kind, message } => (kind, message),
        other => panic!("not a refusal: {other}"),
    }
}

#[test]
fn output_and_exit_codes_come_back() {
    let machine = Machine::new();
    let done = machine.client().run(shell("echo out; echo err >&2; exit 7"), b"").unwrap();
    let expected = Captured {
        status: ExitStatus::Code(7),
        stdout: b"out\n".to_vec(),
        stderr: b"err\n".to_vec(),
    };
    assert_eq!(done, expected);
}

#[test]
fn a_program_killed_by_a_signal_says_so() {
    let machine = Machine::new();
    let done = machine.client().run(shell("kill -TERM $$"), b"").unwrap();
    assert_eq!(done.status, ExitStatus::Signal(15));
    assert_eq!(done.status.shell_code(), 143);
}

#[test]
fn ten_megabytes_pass_both_ways_at_once() {
    let machine = Machine::new();
    let data: Vec<u8> =
        (0..10u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let done = machine.client().run(command(&["cat"]), &data).unwrap();
    assert_eq!(done.status, ExitStatus::Code(0));
    assert!(done.stdout == data, "the bytes differ");
}

#[test]
fn input_that_nobody_reads_blocks_neither_output_nor_signals() {
    let machine = Machine::new();
    let exec = Exec { stdin: true, ..shell("echo ready; exec sleep 1000") };
    let (input, mut output) = machine.client().exec(exec).unwrap();
    assert_eq!(output.next_event().unwrap(), ExecEvent::Stdout(b"ready\n"));
    let flood = input.clone();
    let flooding = std::thread::spawn(move || flood.write_all(&vec![0; 4 << 20]));
    input.signal(15).unwrap();
    assert_eq!(output.next_event().unwrap(), ExecEvent::Exited(ExitStatus::Signal(15)));
    flooding.join().unwrap().unwrap();
}

#[test]
fn a_program_that_closes_its_input_gets_to_its_end() {
    let machine = Machine::new();
    let exec = shell("exec <&-; sleep 0.1; echo done");
    let done = machine.client().run(exec, &vec![0; 4 << 20]).unwrap();
    assert_eq!((done.status, &done.stdout[..]), (ExitStatus::Code(0), &b"done\n"[..]));
}

#[test]
fn a_daemon_left_behind_does_not_hold_the_command_up() {
    let machine = Machine::new();
    let done = machine.client().run(shell("sleep 1000 & echo $!"), b"").unwrap();
    assert_eq!(done.status, ExitStatus::Code(0));
    let pid: i32 = String::from_utf8(done.stdout).unwrap().trim().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn environment_and_directory_are_the_callers() {
    let machine = Machine::new();
    let exec = Exec {
        env: vec![(b"COLOUR".to_vec(), b"green".to_vec())],
        cwd: Some(b"/usr".to_vec()),
        ..shell("echo $COLOUR $PWD $BASE")
    };
    let done = machine.client().run(exec, b"").unwrap();
    assert_eq!(done.stdout, b"green /usr base\n");
}

#[test]
fn programs_that_cannot_start_are_told_apart() {
    let machine = Machine::new();
    let run = |exec| refusal(machine.client().run(exec, b""));
    let (kind, message) = run(command(&["no-such-program"]));
    assert_eq!(kind, RefusalKind::CommandNotFound);
    assert_eq!(message, "no-such-program: command not found");
    assert_eq!(run(command(&["/etc/passwd"])).0, RefusalKind::CannotExecute);
    assert_eq!(run(command(&["/etc"])).0, RefusalKind::CannotExecute);
    assert_eq!(run(command(&[])).0, RefusalKind::Invalid);
    let nowhere = Exec { cwd: Some(b"/nowhere".to_vec()), ..command(&["true"]) };
    assert_eq!(run(nowhere).0, RefusalKind::NotFound);
}

#[test]
fn a_terminal_is_one() {
    let machine = Machine::new();
    let size = WindowSize { rows: 33, columns: 77 };
    let exec = Exec { tty: Some(size), ..shell("test -t 0 && test -t 2 && stty size; tty >&2") };
    let done = machine.client().run(exec, b"").unwrap();
    let text = String::from_utf8(done.stdout).unwrap();
    assert!(text.starts_with("33 77\r\n/dev/pts/"), "{text:?}");
    assert!(done.stderr.is_empty());
}

#[test]
fn a_terminal_takes_input_its_end_and_a_new_size() {
    let machine = Machine::new();
    let size = WindowSize { rows: 1, columns: 1 };
    let script = "stty -echo; echo ready; read line; echo got $line; stty size; cat";
    let exec = Exec { tty: Some(size), stdin: true, ..shell(script) };
    let (input, mut output) = machine.client().exec(exec).unwrap();
    assert_eq!(output.next_event().unwrap(), ExecEvent::Stdout(b"ready\r\n"));
    input.resize(WindowSize { rows: 50, columns: 100 }).unwrap();
    input.write_all(b"hello\n").unwrap();
    input.close().unwrap();
    let mut text = Vec::new();
    let status = loop {
        match output.next_event().unwrap() {
            ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => text.extend_from_slice(bytes),
            ExecEvent::Exited(status) => break status,
        }
    };
    assert_eq!(status, ExitStatus::Code(0));
    assert_eq!(String::from_utf8(text).unwrap(), "got hello\r\n50 100\r\n");
}

#[test]
fn a_vanished_host_takes_its_program_with_it() {
    let machine = Machine::new();
    let fifo = machine.dir().join("alive");
    let alive = support::fifo(&fifo);
    let script = format!("exec 9>{}; echo ready; sleep 1000 & wait", fifo.display());
    let (input, mut output) = machine.client().exec(shell(&script)).unwrap();
    let mut alive = alive.join().unwrap();
    assert_eq!(output.next_event().unwrap(), ExecEvent::Stdout(b"ready\n"));
    drop((input, output));
    assert_eq!(alive.read(&mut [0]).unwrap(), 0, "the program and its child are gone");
}

#[test]
fn a_detached_program_outlives_its_connection() {
    let machine = Machine::new();
    let fifo = machine.dir().join("alive");
    let alive = support::fifo(&fifo);
    // More output than any buffer holds shows that it is still drained.
    let script = format!(
        "exec 9>{}; echo ready; read go <{}; head -c 1000000 /dev/zero; echo survived >&9",
        fifo.display(),
        machine.dir().join("go").display()
    );
    support::make_fifo(&machine.dir().join("go"));
    let exec = Exec { detach: true, ..shell(&script) };
    let (input, mut output) = machine.client().exec(exec).unwrap();
    let mut alive = alive.join().unwrap();
    assert_eq!(output.next_event().unwrap(), ExecEvent::Stdout(b"ready\n"));
    drop((input, output));
    std::fs::write(machine.dir().join("go"), "go\n").unwrap();
    let mut text = String::new();
    alive.read_to_string(&mut text).unwrap();
    assert_eq!(text, "survived\n");
}

#[test]
fn a_connection_serves_several_operations() {
    let machine = Machine::new();
    let mut client = machine.client();
    assert_eq!(client.ping().unwrap(), 0);
    let (_, mut output) = client.exec(command(&["true"])).unwrap();
    assert_eq!(output.next_event().unwrap(), ExecEvent::Exited(ExitStatus::Code(0)));
    let mut client = output.into_client();
    assert_eq!(client.ping().unwrap(), 0);
    let again = client.run(command(&["echo", "again"]), b"").unwrap();
    assert_eq!(again.stdout, b"again\n");
}

fn identity(generation: u64) -> Identity {
    Identity {
        generation,
        entropy: vec![9; MIN_ENTROPY],
        realtime_ns: 1_700_000_000_000_000_000,
        hostname: "stem-1".to_owned(),
        machine_id: "0123456789abcdef0123456789abcdef".to_owned(),
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
