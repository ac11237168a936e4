//! Capturing a fork again, and holding memory and store against their hashes.

use std::fs::File;
use std::io::{BufReader, Seek};

use anyhow::{Context, Result};

use super::Demonstration;
use super::guest::Keeper;
use super::story::INSTANT;
use crate::client::{unexpected, with_file};
use crate::output::bytes;
use crate::rpc::{Fork, Reply, Request};

/// Pages that the barely touched fork changes on purpose.
const TOUCHED_PAGES: u64 = 20;

impl Demonstration<'_> {
    /// A barely touched fork, captured twice.
    pub(super) fn capture_again(&mut self, forks: &[String]) -> Result<()> {
        let name = forks.last().context("there is no fork")?;
        self.say(&format!("capturing {name} again, incrementally"));
        let first = self.snapshot(name, Some("again-1"))?;
        Keeper::connect(&self.client, name)?.ask(&format!("touch {TOUCHED_PAGES}"))?;
        let second = self.snapshot(name, Some("again-2"))?;
        self.figures.incremental_dirty_pages = first.dirty_pages;
        self.figures.incremental_stored_bytes = first.stored_bytes;
        self.figures.incremental_seconds = first.seconds;
        self.figures.second_incremental_stored_bytes = second.stored_bytes;
        let changed = first.dirty_pages * 4096;
        // The pages themselves, and at worst a path of tree nodes for each.
        let bound = changed * 2 + (1 << 20);
        self.check(
            "an incremental snapshot stores what changed, not the machine",
            first.stored_bytes <= bound && second.new_bytes <= changed,
            format!(
                "{} changed pages ({}) stored as {}; the next one as {}",
                first.dirty_pages,
                bytes(changed),
                bytes(first.stored_bytes),
                bytes(second.stored_bytes)
            ),
        );
        self.continue_from_increment(name)
    }

    fn continue_from_increment(&mut self, name: &str) -> Result<()> {
        let request = Request::Fork(Fork {
            source: "again-2".to_owned(),
            count: 1,
            name: Some("grandchild".to_owned()),
            paused: false,
            snapshot_only: true,
            nets: Vec::new(),
            prefetch: true,
        });
        self.client.call(request)?;
        let word = Keeper::connect(&self.client, "grandchild")?.ask("recall")?;
        self.check(
            "a fork of a fork continues from it",
            word == name,
            format!("it recalls {word}"),
        );
        Ok(())
    }

    /// Reads all memory of a machine that never ran, through its pool, and
    /// computes its merkle root anew.
    pub(super) fn compare_memory(&mut self) -> Result<()> {
        self.say("reading the whole memory of a fork that never ran");
        self.fork("still", true)?;
        let path = self.folder.join("still.memory");
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        let request = Request::DumpMemory { machine: "still".to_owned() };
        self.client.ask(request, &with_file(&file), &mut |_| {})?;
        (&file).rewind()?;
        let found = coppice_engine::tree_root_of(BufReader::new(&file))?.root.to_string();
        std::fs::remove_file(&path)?;
        let reply = self.client.call(Request::Show { name: INSTANT.to_owned() })?;
        let Reply::Shown(shown) = reply else { return unexpected(&reply) };
        let memory = shown.images.iter().find(|image| image.part == "memory");
        let expected = memory.context("the snapshot has no memory")?.root.clone();
        self.check(
            "a fork's memory is the captured memory, byte for byte",
            found == expected,
            format!("merkle root {}", &found[..16.min(found.len())]),
        );
        Ok(())
    }

    pub(super) fn verify_store(&mut self) -> Result<()> {
        self.say("verifying every byte of the store");
        let reply = self.client.call(Request::Check(crate::rpc::Scope::Full))?;
        let Reply::Checked(found) = reply else { return unexpected(&reply) };
        self.figures.check_seconds = found.seconds;
        let detail = format!(
            "{} packs, {} chunks, {}, {} problems",
            found.packs,
            found.chunks,
            bytes(found.bytes),
            found.problems.len()
        );
        self.check("the store is whole", found.ok, detail);
        let reply = self.client.call(Request::Stats)?;
        let Reply::Stats(stats) = reply else { return unexpected(&reply) };
        self.figures.store_stored_bytes = stats.stored_bytes;
        Ok(())
    }
}
