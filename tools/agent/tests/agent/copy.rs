//! Copies of trees in both directions, from honest and hostile sides.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use coppice_agent::{
    Client, ClientError, CopyReport, Entry, EntryKind, RefusalKind, Reply, Request, VERSION,
    decode, encode, read_frame,
};

use crate::support::{self, Machine, refusal};

/// A tree with all that a tree can have.
fn plant(root: &Path) -> PathBuf {
    let top = root.join("tree");
    fs::create_dir_all(top.join("deep/er/est")).unwrap();
    fs::create_dir(top.join("empty")).unwrap();
    fs::write(top.join("small"), "small").unwrap();
    fs::write(top.join("none"), "").unwrap();
    fs::write(top.join("deep/er/est/large"), vec![7; 3_000_001]).unwrap();
    fs::write(top.join(std::ffi::OsStr::from_bytes(b"not \xff utf-8")), "x").unwrap();
    symlink("deep/er", top.join("link")).unwrap();
    symlink("/nowhere", top.join("dangling")).unwrap();
    fs::set_permissions(top.join("small"), Permissions::from_mode(0o640)).unwrap();
    fs::set_permissions(top.join("deep/er/est"), Permissions::from_mode(0o500)).unwrap();
    support::make_fifo(&top.join("fifo"));
    top
}

/// Every file of a tree with what is to be preserved.
fn listing(top: &Path) -> Vec<(PathBuf, u32, i64, Vec<u8>)> {
    let mut all = Vec::new();
    let mut left = vec![top.to_path_buf()];
    while let Some(path) = left.pop() {
        let meta = path.symlink_metadata().unwrap();
        let below = path.strip_prefix(top).unwrap().to_path_buf();
        if meta.is_dir() {
            left.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
            all.push((below, meta.mode(), meta.mtime_nsec(), Vec::new()));
        } else if meta.is_symlink() {
            let target = path.read_link().unwrap();
            all.push((below, 0, 0, target.as_os_str().as_bytes().to_vec()));
        } else if meta.is_file() {
            all.push((below, meta.mode(), meta.mtime_nsec(), fs::read(path).unwrap()));
        }
    }
    all.sort();
    all
}

/// Compares two trees without printing what is in their files.
fn assert_same(left: &Path, right: &Path) {
    let (left, right) = (listing(left), listing(right));
    assert_eq!(left.len(), right.len());
    for (left, right) in left.iter().zip(&right) {
        assert_eq!((&left.0, left.1, left.2), (&right.0, right.1, right.2));
        assert!(left.3 == right.3, "the content of {} differs", left.0.display());
    }
}

#[test]
fn a_tree_survives_the_way_in_and_out() {
    let machine = Machine::new();
    let top = plant(machine.dir());
    let expected = CopyReport { entries: 11, bytes: 3_000_007, skipped: 1 };
    let inside = machine.dir().join("inside");
    assert_eq!(machine.client().put(&top, &inside).unwrap(), expected);
    assert_same(&inside, &top);

    let out = machine.dir().join("out");
    fs::create_dir(&out).unwrap();
    let mut client = machine.client();
    let back = client.get(&inside, &out).unwrap();
    assert_eq!(back, CopyReport { skipped: 0, ..expected });
    assert_same(&out.join("inside"), &top);
    assert_eq!(client.ping().unwrap(), 0, "the connection can go on");
}

#[test]
fn the_target_decides_the_name() {
    let machine = Machine::new();
    let dir = machine.dir();
    fs::write(dir.join("one"), "1").unwrap();
    fs::create_dir(dir.join("box")).unwrap();
    let put = |to: &str| machine.client().put(&dir.join("one"), &dir.join(to));
    put("box").unwrap();
    put("two").unwrap();
    assert_eq!(fs::read(dir.join("box/one")).unwrap(), b"1");
    assert_eq!(fs::read(dir.join("two")).unwrap(), b"1");
    assert_eq!(refusal(put("absent/")).0, RefusalKind::NotFound);
    assert_eq!(refusal(put("absent/deeper")).0, RefusalKind::NotFound);
    assert!(matches!(machine.client().put(&dir.join("void"), dir), Err(ClientError::Local(_))));
    let missing = machine.client().get(&dir.join("void"), dir);
    assert_eq!(refusal(missing).0, RefusalKind::NotFound);
}

#[test]
fn files_are_replaced_and_directories_are_filled() {
    let machine = Machine::new();
    let dir = machine.dir();
    fs::create_dir_all(dir.join("from/d")).unwrap();
    fs::write(dir.join("from/d/new"), "new").unwrap();
    fs::write(dir.join("from/d/file"), "fresh").unwrap();
    fs::create_dir_all(dir.join("to/from/d")).unwrap();
    fs::write(dir.join("to/from/d/old"), "old").unwrap();
    fs::write(dir.join("elsewhere"), "untouched").unwrap();
    symlink(dir.join("elsewhere"), dir.join("to/from/d/file")).unwrap();
    machine.client().put(&dir.join("from"), &dir.join("to")).unwrap();
    let read = |path: &str| fs::read_to_string(dir.join(path)).unwrap();
    assert_eq!(read("to/from/d/old"), "old");
    assert_eq!(read("to/from/d/new"), "new");
    assert_eq!(read("to/from/d/file"), "fresh");
    assert_eq!(read("elsewhere"), "untouched", "a link is replaced, not followed");
}

#[test]
fn a_copy_that_is_refused_ends_early_and_leaves_the_agent_whole() {
    let machine = Machine::new();
    let dir = machine.dir();
    fs::write(dir.join("large"), vec![1; 20 << 20]).unwrap();
    fs::create_dir_all(dir.join("to/large")).unwrap();
    let refused = machine.client().put(&dir.join("large"), &dir.join("to"));
    assert_eq!(refusal(refused).0, RefusalKind::System);
    assert_eq!(machine.client().ping().unwrap(), 0);
}

fn entry(path: &str, kind: EntryKind) -> Entry {
    Entry { path: path.as_bytes().to_vec(), kind, mtime_ns: 0 }
}

fn file(path: &str) -> Entry {
    entry(path, EntryKind::File { mode: 0o644 })
}

fn directory(path: &str) -> Entry {
    entry(path, EntryKind::Directory { mode: 0o755 })
}

fn link(path: &str, target: &str) -> Entry {
    entry(path, EntryKind::Symlink { target: target.as_bytes().to_vec() })
}

/// Trees that try to reach `outside`, which lies beside their target.
fn hostile_trees() -> Vec<(&'static str, Vec<Entry>)> {
    vec![
        ("top", vec![directory(""), file("../outside/x")]),
        ("top", vec![directory(""), file("/outside/x")]),
        ("top", vec![directory(""), file("a/../../../outside/x")]),
        ("top", vec![directory(""), file("a//b")]),
        ("top", vec![directory(""), file("a\0b")]),
        ("top", vec![file("x")]),
        ("top", vec![directory(""), directory("")]),
        ("top", vec![link("", "../outside"), file("x")]),
        ("top", vec![directory(""), link("l", "../../outside"), file("l/x")]),
        ("top", vec![directory(""), link("l", "../../outside"), directory("l"), file("l/x")]),
        ("top", vec![directory(""), link("l", ""), file("x")]),
        ("top", vec![directory(""), file("f"), file("f/x")]),
        ("..", vec![directory(""), file("outside/x")]),
        ("a/b", vec![directory("")]),
        ("", vec![directory("")]),
        ("top", vec![]),
    ]
}

fn arena() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("outside")).unwrap();
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    (dir, target)
}

fn assert_nothing_escaped(arena: &Path, tree: &[Entry]) {
    let outside: Vec<_> = arena.join("outside").read_dir().unwrap().collect();
    assert!(outside.is_empty(), "{tree:?} left {outside:?}");
    let mut names: Vec<_> =
        arena.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["outside", "target"], "{tree:?}");
}

#[test]
fn nothing_hostile_leaves_the_target_in_the_guest() {
    let machine = Machine::new();
    for (name, tree) in hostile_trees() {
        let (arena, target) = arena();
        let mut wire = Vec::new();
        let mut say = |request: &Request, data: &[u8]| encode(request, data, &mut wire).unwrap();
        say(&Request::Hello { version: VERSION, generation: 0 }, b"");
        let path = target.as_os_str().as_bytes().to_vec();
        say(&Request::Put { path, name: name.as_bytes().to_vec() }, b"");
        for entry in &tree {
            say(&Request::Entry(entry.clone()), b"");
            if matches!(entry.kind, EntryKind::File { .. }) {
                say(&Request::Data, b"payload");
            }
        }
        say(&Request::End, b"");
        say(&Request::Ping, b"");
        let mut stream = machine.connect();
        stream.write_all(&wire).unwrap();
        let mut body = Vec::new();
        read_frame(&mut stream, &mut body).unwrap();
        let (reply, _) = decode::<Reply>(&body).unwrap();
        assert!(matches!(reply, Reply::Refused { .. }), "{name:?} {tree:?}: {reply:?}");
        read_frame(&mut stream, &mut body).unwrap();
        let (reply, _) = decode::<Reply>(&body).unwrap();
        assert!(matches!(reply, Reply::Pong { .. }), "{reply:?}");
        assert_nothing_escaped(arena.path(), &tree);
    }
}

#[test]
fn nothing_hostile_leaves_the_target_on_the_host() {
    for (name, tree) in hostile_trees() {
        let (arena, target) = arena();
        let (host, mut guest) = UnixStream::pair().unwrap();
        let mut wire = Vec::new();
        let mut say = |reply: &Reply, data: &[u8]| encode(reply, data, &mut wire).unwrap();
        say(&Reply::Top { name: name.as_bytes().to_vec() }, b"");
        for entry in &tree {
            say(&Reply::Entry(entry.clone()), b"");
            if matches!(entry.kind, EntryKind::File { .. }) {
                say(&Reply::Data, b"payload");
            }
        }
        say(&Reply::Copied(CopyReport::default()), b"");
        guest.write_all(&wire).unwrap();
        let result = Client::new(host, 0).unwrap().get(Path::new("/any"), &target);
        assert!(matches!(result, Err(ClientError::Local(_))), "{name:?} {tree:?}: {result:?}");
        assert_nothing_escaped(arena.path(), &tree);
    }
}

#[test]
fn no_file_from_a_guest_becomes_set_user_id() {
    let (_arena, target) = arena();
    let (host, mut guest) = UnixStream::pair().unwrap();
    let mut wire = Vec::new();
    encode(&Reply::Top { name: b"su".to_vec() }, b"", &mut wire).unwrap();
    let evil = entry("", EntryKind::File { mode: 0o106_755 });
    encode(&Reply::Entry(evil), b"", &mut wire).unwrap();
    encode(&Reply::Copied(CopyReport::default()), b"", &mut wire).unwrap();
    guest.write_all(&wire).unwrap();
    Client::new(host, 0).unwrap().get(Path::new("/any"), &target).unwrap();
    assert_eq!(target.join("su").metadata().unwrap().mode() & 0o7777, 0o755);
}
