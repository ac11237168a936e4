//! Byte streams through the command line: files and pipes in, files and pipes
//! out, and everything else that is asked about them.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use coppice_tests::Coppice;
use serde_json::Value;

/// Bytes that do not compress and repeat nowhere.
fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend((seed ^ (seed >> 29)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Imports what comes through a pipe.
fn import_piped(coppice: &Coppice, bytes: &[u8], name: &str, kind: &str) -> Value {
    let mut child = coppice
        .command()
        .args(["--json", "import", "-", "--name", name, "--as", kind])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success());
    serde_json::from_slice(&done.stdout).unwrap()
}

fn export_piped(coppice: &Coppice, name: &str) -> Vec<u8> {
    let done = coppice.command().args(["export", name, "-"]).output().unwrap();
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    done.stdout
}

#[test]
fn what_comes_through_pipes_goes_out_through_pipes() {
    let coppice = Coppice::new().unwrap();
    let mut bytes = noise(5 << 20, 1);
    bytes[1 << 20..3 << 20].fill(0);
    let piped = import_piped(&coppice, &bytes, "piped", "stream");
    assert_eq!(piped["logical_bytes"], 5 << 20);
    assert!(piped["new_bytes"].as_u64().unwrap() < 7 << 19, "{piped}");
    assert!(export_piped(&coppice, "piped") == bytes);

    // A file is the same stream, and so is what is left of one.
    let path = coppice.scratch("file");
    std::fs::write(&path, [&[1; 10][..], &bytes].concat()).unwrap();
    let mut file = File::open(&path).unwrap();
    file.read_exact(&mut [0; 10]).unwrap();
    let done = coppice
        .command()
        .args(["import", "-", "--name", "rest", "--as", "stream"])
        .stdin(file)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let shown = coppice.json(&["show", "rest"]).unwrap();
    assert_eq!(shown["images"][0]["root"], piped["root"]);
    assert_eq!(shown["snapshot"]["kind"], "stream");
    let data = shown["images"][0]["data_bytes"].as_u64().unwrap();
    assert!((3 << 20..7 << 19).contains(&data), "{shown}");

    // Disks go through pipes too, and empty streams.
    import_piped(&coppice, &bytes[..1_234_567], "disk", "disk");
    assert!(export_piped(&coppice, "disk") == bytes[..1_234_567]);
    import_piped(&coppice, &[], "empty", "stream");
    assert!(export_piped(&coppice, "empty").is_empty());
    let out = coppice.scratch("out");
    coppice.text(&["export", "empty", out.to_str().unwrap()]).unwrap();
    assert_eq!(std::fs::metadata(&out).unwrap().len(), 0);
}

#[test]
fn what_an_ended_command_left_in_its_pipe_is_no_snapshot() {
    let coppice = Coppice::new().unwrap();
    coppice.text(&["stats"]).unwrap();
    // A socket, so that this side sees when the other one is done with it.
    let (mut mine, theirs) = UnixStream::pair().unwrap();
    let mut child = coppice
        .command()
        .args(["import", "-", "--name", "half", "--as", "stream"])
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // More than a socket holds: somebody reads.
    mine.write_all(&noise(8 << 20, 4)).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    mine.shutdown(std::net::Shutdown::Write).unwrap();
    // The other side ends, with what nobody wants still in the socket.
    match mine.read(&mut [0]) {
        Ok(count) => assert_eq!(count, 0),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    let line = coppice.refusal(&["show", "half"]).unwrap();
    assert!(line.contains("no snapshot named half"), "{line}");
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
}

/// The input never ends: whoever wanted it is gone, so nobody reads on.
#[test]
fn nobody_reads_on_for_a_command_that_was_ended() {
    let coppice = Coppice::new().unwrap();
    coppice.text(&["stats"]).unwrap();
    for writes in [true, false] {
        let mut import = coppice.command();
        import.args(["import", "-", "--name", "endless", "--as", "stream"]);
        import.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = import.spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        pipe.write_all(&noise(1 << 20, 9)).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        // Nobody has the other end any more, sooner or later.
        let (gone, is_gone) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let part = vec![7; if writes { 1 << 16 } else { 1 }];
            while pipe.write_all(&part).is_ok() {
                let pause = if writes { 0 } else { 100 };
                std::thread::sleep(std::time::Duration::from_millis(pause));
            }
            gone.send(()).unwrap();
        });
        is_gone.recv_timeout(std::time::Duration::from_secs(120)).expect("nobody reads on");
        assert!(coppice.refusal(&["show", "endless"]).unwrap().contains("endless"));
    }
}

#[test]
fn a_reader_that_leaves_ends_an_export_with_one_line() {
    let coppice = Coppice::new().unwrap();
    import_piped(&coppice, &noise(8 << 20, 2), "long", "stream");
    let mut child = coppice
        .command()
        .args(["export", "long", "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 100]).unwrap();
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(errors.lines().count() == 1 && errors.contains("write"), "{errors}");
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
}

#[test]
fn versions_of_a_stream_share_what_they_have_in_common() {
    let coppice = Coppice::new().unwrap();
    let file = coppice.scratch("file");
    let import = |name: &str, bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        let arguments = ["import", path(&file), "--name", name, "--as", "stream"];
        coppice.json(&arguments).unwrap()
    };
    let mut bytes = noise(8 << 20, 3);
    import("one", &bytes);
    bytes[5 << 20] ^= 1;
    import("two", &bytes);
    bytes.splice(100..100, *b"inserted");
    let third = import("three", &bytes);
    assert!(third["new_bytes"].as_u64().unwrap() < 128 << 10, "{third}");

    let diff = coppice.json(&["diff", "one", "two"]).unwrap();
    let part = &diff["parts"][0];
    assert_eq!(part["part"], "stream");
    let extents = part["extents"].as_array().unwrap();
    assert_eq!(extents.len(), 1, "{diff}");
    let offset = extents[0]["offset"].as_u64().unwrap();
    let length = extents[0]["length"].as_u64().unwrap();
    assert!((offset..offset + length).contains(&(5 << 20)) && length < 256 << 10, "{diff}");
    assert_eq!(part["changed_bytes"].as_u64().unwrap(), length);

    // What one of them alone has is what its removal frees.
    let usage = |name: &str| {
        let shown = coppice.json(&["show", name, "--usage"]).unwrap();
        shown["usage"]["snapshot"]["own"].clone()
    };
    let own = usage("three");
    assert_eq!(own["logical_bytes"].as_u64().unwrap(), (8 << 20) + 8);
    assert_eq!(own["referenced_bytes"].as_u64().unwrap(), (8 << 20) + 8, "noise repeats nowhere");
    let exclusive = own["exclusive_bytes"].as_u64().unwrap();
    assert_eq!(exclusive, third["new_bytes"].as_u64().unwrap(), "{own}");
    let before = coppice.json(&["stats"]).unwrap();
    coppice.text(&["rmi", "three"]).unwrap();
    coppice.text(&["gc", "--min-dead", "0"]).unwrap();
    let after = coppice.json(&["stats"]).unwrap();
    let unique = |stats: &Value| stats["unique_bytes"].as_u64().unwrap();
    assert_eq!(unique(&before) - unique(&after), exclusive);
    assert_eq!(coppice.json(&["check"]).unwrap()["ok"], true);
    bytes.drain(100..108);
    assert!(export_piped(&coppice, "two") == bytes);
    let tree = coppice.json(&["tree", "--usage"]).unwrap();
    assert_eq!(tree["snapshots"].as_array().unwrap().len(), 2);
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
