//! Pages of a guest's page cache cost nothing beside the blocks of its disk:
//! both are pages of 4 KiB in the one store.
//!
//! A guest reads the files of some folders. What they hold is taken from its
//! disk by `debugfs`, from which the guest's image was made too, and held
//! against the captured memory and against the tables of the packs that the
//! capture added.

#![expect(clippy::unwrap_used, reason = "a test fails where it finds what it does not expect")]

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;

use coppice_tests::pack_keys::{self, Key};
use coppice_tests::{Coppice, Guest, guest};

/// What is read: 8 MiB, with `COPPICE_LONG` 100 MiB.
fn folders() -> &'static [&'static str] {
    match std::env::var_os("COPPICE_LONG") {
        Some(_) => &["/usr/sbin", "/usr/bin", "/usr/lib"],
        None => &["/usr/sbin"],
    }
}

#[test]
fn cached_file_pages_are_not_stored_again() {
    let Some(guest) = guest() else { return };
    let coppice = Coppice::new().unwrap();
    let kernel = guest.kernel.to_str().unwrap();
    coppice.text(&["import", guest.disk.to_str().unwrap(), "--name", "root"]).unwrap();
    let of_disk = pack_keys::of_store(&coppice.store()).unwrap();
    let run = ["run", "--name", "reader", "--kernel", kernel, "--disk", "root", "--memory", "256"];
    coppice.text(&run).unwrap();
    let before = coppice.json(&["snapshot", "reader", "--name", "before"]).unwrap();
    let script = format!("find {} -type f -exec cat {{}} + > /dev/null", folders().join(" "));
    coppice.text(&["exec", "reader", "--", "sh", "-c", &script]).unwrap();
    let after = coppice.json(&["snapshot", "reader", "--name", "after"]).unwrap();

    let memory = coppice.scratch("memory");
    coppice.text(&["export", "--memory", "after", memory.to_str().unwrap()]).unwrap();
    let memory: HashSet<Key> = pack_keys::of_file(&memory).unwrap().into_iter().collect();
    let added: HashSet<Key> = pack_keys::of_store(&coppice.store())
        .unwrap()
        .into_iter()
        .filter(|(pack, _)| !of_disk.contains_key(pack))
        .flat_map(|(_, keys)| keys)
        .collect();
    let files = pages_of_folders(&coppice, &guest);
    let cached = files.iter().filter(|page| memory.contains(*page)).count();
    let anew = files.iter().filter(|page| added.contains(*page)).count();
    println!(
        "{} pages of files were read, {cached} are in memory, {anew} of them were stored anew; \
         the capture before added {} bytes of pages, the one after {}, for {} pages that differ",
        files.len(),
        before["new_bytes"],
        after["new_bytes"],
        after["dirty_pages"],
    );
    assert!(files.len() > 1000, "there is something to read");
    assert!(cached * 100 >= files.len() * 95, "what was read is in memory");
    assert!(anew * 100 <= files.len(), "pages of files are shared with their blocks");
}

/// The pages of the files that the guest read, by what its disk says.
fn pages_of_folders(coppice: &Coppice, guest: &Guest) -> Vec<Key> {
    let mut pages = Vec::new();
    for (number, folder) in folders().iter().enumerate() {
        let copy = coppice.scratch(&format!("copy-{number}"));
        std::fs::create_dir(&copy).unwrap();
        let order = format!("rdump {folder} {}", copy.display());
        let done = Command::new("debugfs").args(["-R", &order]).arg(&guest.disk).output();
        let done = done.expect("debugfs comes with mke2fs, which makes the guest's disk");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        pages_below(&copy, &mut pages);
    }
    pages
}

fn pages_below(folder: &Path, pages: &mut Vec<Key>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            pages_below(&entry.path(), pages);
        } else if kind.is_file() {
            pages.extend(pack_keys::of_file(&entry.path()).unwrap());
        }
    }
}
