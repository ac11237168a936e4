//! Programs: their streams, their ends, their terminals.

use std::io::Read;

use coppice_agent::{Captured, Exec, ExecEvent, ExitStatus, RefusalKind, WindowSize};

use crate::support::{self, Machine, command, refusal, shell};

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
