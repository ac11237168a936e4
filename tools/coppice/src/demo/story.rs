//! The story, chapter by chapter.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, Seek};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use super::Demonstration;
use super::guest::{Keeper, PORT, PROGRAM, host_available};
use super::report::Spread;
use crate::client::{unexpected, with_file};
use crate::commands::exec::{Finished, capture, send_file};
use crate::output::{bytes, micros};
use crate::rpc::{Boot, Captured, Fork, Forked, MachineLine, Reply, Request};

const DISK: &str = "root-disk";
const PARENT: &str = "parent";
const INSTANT: &str = "instant";
const KEEPER_PATH: &str = "/root/keeper.py";
const MARK_PATH: &str = "/root/mark";

/// How long the process in the guest may take to start.
const KEEPER_LIMIT: Duration = Duration::from_secs(120);

/// How many forks also run commands that are slow in an emulated guest kernel.
const CLOSER_LOOKS: usize = 3;

/// Pages that the barely touched fork changes on purpose.
const TOUCHED_PAGES: u64 = 20;

/// How far a fork's clock may be off.
const CLOCK_LIMIT_SECONDS: f64 = 1.0;

impl Demonstration<'_> {
    /// Tells it from the beginning to the end.
    pub(super) fn tell(&mut self) -> Result<()> {
        self.figures.host_available_before_bytes = host_available()?;
        self.bring_disk()?;
        self.boot()?;
        let word = self.give_it_state()?;
        let counted = self.capture_parent()?;
        let forks = self.regrow()?;
        self.measure(&forks)?;
        self.talk(&forks, &word, counted)?;
        self.diverge(&forks, &word)?;
        self.look_at_identity(&forks)?;
        self.capture_again(&forks)?;
        self.compare_memory()?;
        self.verify_store()?;
        self.figures.total_seconds = self.begun.elapsed().as_secs_f64();
        Ok(())
    }

    fn bring_disk(&mut self) -> Result<()> {
        let path = &self.options.disk;
        self.say(&format!("importing the root disk {}", path.display()));
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let request = Request::Import { name: DISK.to_owned(), stream: false };
        let (reply, _) = self.client.ask(request, &with_file(&file), &mut |_| {})?;
        let Reply::Imported(done) = reply else { return unexpected(&reply) };
        self.figures.import_seconds = done.seconds;
        self.say(&format!(
            "imported {} as {} of compressed chunks",
            bytes(done.logical_bytes),
            bytes(done.stored_bytes)
        ));
        Ok(())
    }

    fn boot(&mut self) -> Result<()> {
        let path = &self.options.kernel;
        let kernel = File::open(path)
            .with_context(|| format!("cannot read the kernel {}", path.display()))?;
        self.say("booting Linux on it (once: everything later continues from snapshots)");
        let begun = Instant::now();
        let boot = Boot {
            name: Some(PARENT.to_owned()),
            disks: vec![DISK.to_owned()],
            memory_mib: self.options.memory,
            cpus: 1,
            cmdline: None,
        };
        let (reply, _) =
            self.client.ask(Request::Boot(boot), &with_file(&kernel), &mut |_| {})?;
        let Reply::Forked(_) = reply else { return unexpected(&reply) };
        let first = self.run(PARENT, &["uname", "-srm"])?;
        self.figures.boot_seconds = begun.elapsed().as_secs_f64();
        let detail = format!("{} after {:.1} s", first.trim(), self.figures.boot_seconds);
        self.check("a machine boots from a disk in the store", first.starts_with("Linux"), detail);
        Ok(())
    }

    /// Starts the process and tells it a word that is nowhere else.
    fn give_it_state(&mut self) -> Result<String> {
        self.say("starting a Python process that keeps its state in memory");
        send_file(&self.client, PARENT, PROGRAM.as_bytes(), KEEPER_PATH)?;
        let start = format!("python3 {KEEPER_PATH} {PORT} >/root/keeper.log 2>&1 </dev/null &");
        self.run(PARENT, &["sh", "-c", &start])?;
        let mut keeper = Keeper::wait(&self.client, PARENT, KEEPER_LIMIT)?;
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
        let word: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        keeper.ask(&format!("remember {word}"))?;
        self.run(PARENT, &["sh", "-c", &format!("echo parent > {MARK_PATH}")])?;
        self.say(&format!("it remembers the word {word}, which no file holds"));
        Ok(word)
    }

    /// Captures the machine; returns how many questions its process had
    /// answered by then.
    fn capture_parent(&mut self) -> Result<u64> {
        let counted = Keeper::connect(&self.client, PARENT)?.ask("count")?.parse()?;
        self.say("capturing the whole machine: memory, disk, CPU, devices");
        let done = self.snapshot(PARENT, Some(INSTANT))?;
        self.figures.snapshot_seconds = done.seconds;
        self.figures.pause_us = done.pause_us;
        self.figures.logical_bytes = done.logical_bytes;
        self.figures.stored_bytes = done.stored_bytes;
        let detail = format!(
            "{} as {} stored, {:.2} s, paused {}",
            bytes(done.logical_bytes),
            bytes(done.stored_bytes),
            done.seconds,
            micros(done.pause_us)
        );
        self.check("a running machine is captured whole", done.stored_bytes > 0, detail);
        let answer = Keeper::connect(&self.client, PARENT)?.ask("count")?;
        let goes_on = answer.parse::<u64>()? == counted + 1;
        self.check("the captured machine goes on", goes_on, format!("it has answered {answer}"));
        Ok(counted)
    }

    /// Grows the forks, each answered before the next is made.
    fn regrow(&mut self) -> Result<Vec<String>> {
        let count = self.options.forks;
        if count == 0 {
            bail!("--forks must be at least 1");
        }
        self.say(&format!("regrowing it as {count} forks, lazily, from the store"));
        let mut names = Vec::new();
        let mut ready = Vec::new();
        let mut reply = Vec::new();
        let mut ids = BTreeSet::new();
        for number in 1..=count {
            let begun = Instant::now();
            let fork = self.fork(&format!("fork-{number}"), false)?;
            let machine = fork.machines.into_iter().next().context("no fork was made")?;
            let id = self.run(&machine.name, &["cat", "/etc/machine-id"])?;
            reply.push(u64::try_from(begun.elapsed().as_micros())?);
            ready.push(machine.ready_us);
            ids.insert(id);
            names.push(machine.name);
            if number % 10 == 0 || number == count {
                self.say(&format!("{number} of {count} forks answer"));
            }
        }
        self.figures.fork_ready_us = Spread::of(&ready);
        self.figures.fork_reply_us = Spread::of(&reply);
        let detail = format!("{} machine ids for {} forks", ids.len(), names.len());
        self.check("every fork has an identity of its own", ids.len() == names.len(), detail);
        Ok(names)
    }

    /// What the forks cost, by the kernel's own accounting.
    fn measure(&mut self, forks: &[String]) -> Result<()> {
        self.figures.host_available_after_bytes = host_available()?;
        let spent = self
            .figures
            .host_available_before_bytes
            .saturating_sub(self.figures.host_available_after_bytes);
        let count = u64::try_from(forks.len())?;
        self.figures.host_bytes_per_fork = spent / count;
        let lines = self.fork_lines(forks)?;
        let first = lines.first().context("the forks are not listed")?;
        self.figures.first_fork_store_pages = first.pages_installed;
        self.figures.first_fork_faults = first.faults;
        let rest = &lines[1..];
        let spread = |field: fn(&MachineLine) -> u64| {
            Spread::of(&rest.iter().map(field).collect::<Vec<u64>>())
        };
        self.figures.later_fork_store_pages = spread(|line| line.pages_installed);
        self.figures.later_fork_faults = spread(|line| line.faults);
        let mean = |field: fn(&MachineLine) -> u64| lines.iter().map(field).sum::<u64>() / count;
        self.figures.private_bytes_per_fork = mean(|line| line.private_bytes);
        self.figures.shared_bytes_per_fork = mean(|line| line.shared_bytes);
        self.figures.pss_bytes_per_fork = mean(|line| line.pss_bytes);
        self.figures.page_table_bytes_per_fork = mean(|line| line.page_table_bytes);
        let running = lines.iter().filter(|line| line.state == "running").count();
        let detail = format!(
            "{} private and {} shared each; {} of the host's memory each, all in",
            bytes(self.figures.private_bytes_per_fork),
            bytes(self.figures.shared_bytes_per_fork),
            bytes(self.figures.host_bytes_per_fork)
        );
        self.check("all forks run at the same time", running == forks.len(), detail);
        let detail = format!(
            "the first read {} pages, half of the later ones at most {}",
            self.figures.first_fork_store_pages, self.figures.later_fork_store_pages.p50
        );
        let shared = self.figures.later_fork_store_pages.p50 <= self.figures.first_fork_store_pages;
        self.check("later forks find pages that earlier ones fetched", shared, detail);
        Ok(())
    }

    fn fork_lines(&self, forks: &[String]) -> Result<Vec<MachineLine>> {
        let reply = self.client.call(Request::Machines)?;
        let Reply::Machines(lines) = reply else { return unexpected(&reply) };
        forks
            .iter()
            .map(|name| {
                let line = lines.iter().find(|line| line.name == *name);
                line.cloned().with_context(|| format!("{name} is not listed"))
            })
            .collect()
    }

    /// Every fork must answer with the state that only memory held.
    fn talk(&mut self, forks: &[String], word: &str, counted: u64) -> Result<()> {
        self.say("asking every fork for the word");
        let mut recalled = 0;
        let mut continued = 0;
        let mut random = BTreeSet::new();
        let mut clock_off: f64 = 0.0;
        for name in forks {
            let mut keeper = Keeper::connect(&self.client, name)?;
            recalled += usize::from(keeper.ask("recall")? == word);
            // Its count goes on from the captured instant: "recall" and this
            // question came since.
            continued += usize::from(keeper.ask("count")?.parse::<u64>()? == counted + 2);
            random.insert(keeper.ask("random")?);
            let theirs: f64 = keeper.ask("time")?.parse()?;
            let ours = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
            clock_off = clock_off.max((ours - theirs).abs());
        }
        let all = forks.len();
        self.check(
            "state that lived only in memory answers in every fork",
            recalled == all,
            format!("{recalled} of {all} recall {word}"),
        );
        self.check(
            "every fork continues from the captured instant",
            continued == all,
            format!("{continued} of {all} went on counting from {counted}"),
        );
        self.check(
            "forks draw different random bytes",
            random.len() == all,
            format!("{} different draws of 16 bytes from {all} forks", random.len()),
        );
        self.check(
            "every fork's clock is right",
            clock_off < CLOCK_LIMIT_SECONDS,
            format!("at most {clock_off:.3} s off"),
        );
        Ok(())
    }

    /// Changes a variable in every fork and a file in some; nobody else may
    /// see it.
    fn diverge(&mut self, forks: &[String], word: &str) -> Result<()> {
        self.say("letting the forks diverge");
        for name in forks {
            let mut keeper = Keeper::connect(&self.client, name)?;
            keeper.ask(&format!("mark {name}"))?;
            keeper.ask(&format!("remember {name}"))?;
        }
        let mut own = 0;
        for name in forks {
            let mut keeper = Keeper::connect(&self.client, name)?;
            own += usize::from(keeper.ask("marks")? == *name && keeper.ask("recall")? == *name);
        }
        let mut parent = Keeper::connect(&self.client, PARENT)?;
        let untouched = parent.ask("recall")? == word && parent.ask("marks")?.is_empty();
        self.check(
            "a variable changed in one fork changes nowhere else",
            own == forks.len() && untouched,
            format!("{own} of {} see only their own change, the parent none", forks.len()),
        );
        self.diverge_files(forks)
    }

    fn diverge_files(&mut self, forks: &[String]) -> Result<()> {
        let closer: Vec<&String> = forks.iter().take(CLOSER_LOOKS).collect();
        for name in closer.iter().skip(1) {
            self.run(name, &["sh", "-c", &format!("echo {name} > {MARK_PATH}; sync")])?;
        }
        let mut right = true;
        for (index, name) in closer.iter().enumerate() {
            let expected = if index == 0 { "parent" } else { name.as_str() };
            right &= self.run(name, &["cat", MARK_PATH])?.trim() == expected;
        }
        right &= self.run(PARENT, &["cat", MARK_PATH])?.trim() == "parent";
        self.check(
            "a file changed in one fork changes nowhere else",
            right,
            format!("compared in {} forks and the parent", closer.len()),
        );
        Ok(())
    }

    /// What a person would type to see that a fork is a machine of its own.
    fn look_at_identity(&mut self, forks: &[String]) -> Result<()> {
        let mut names = BTreeSet::new();
        let mut draws = BTreeSet::new();
        let closer: Vec<&String> = forks.iter().take(CLOSER_LOOKS).collect();
        for name in &closer {
            names.insert(self.run(name, &["cat", "/proc/sys/kernel/hostname"])?);
            draws.insert(self.run(name, &["sh", "-c", "head -c 16 /dev/urandom | od -An -tx1"])?);
        }
        let first = forks.first().context("there is no fork")?;
        let theirs: f64 = self.run(first, &["date", "+%s.%N"])?.trim().parse()?;
        let ours = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let off = (ours - theirs).abs();
        self.check(
            "`hostname` and `/dev/urandom` differ, `date` is right",
            names.len() == closer.len() && draws.len() == closer.len() && off < CLOCK_LIMIT_SECONDS,
            format!("{} host names, {} draws, {off:.3} s off", names.len(), draws.len()),
        );
        Ok(())
    }

    /// A barely touched fork, captured twice.
    fn capture_again(&mut self, forks: &[String]) -> Result<()> {
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
            first.stored_bytes <= bound && second.new_bytes <= first.logical_bytes / 20,
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
    fn compare_memory(&mut self) -> Result<()> {
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

    fn verify_store(&mut self) -> Result<()> {
        self.say("verifying every byte of the store");
        let reply = self.client.call(Request::Check)?;
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

    fn fork(&self, name: &str, paused: bool) -> Result<Forked> {
        let request = Request::Fork(Fork {
            source: INSTANT.to_owned(),
            count: 1,
            name: Some(name.to_owned()),
            paused,
            snapshot_only: true,
        });
        match self.client.call(request)? {
            Reply::Forked(forked) => Ok(forked),
            other => unexpected(&other),
        }
    }

    fn snapshot(&self, machine: &str, name: Option<&str>) -> Result<Captured> {
        let request = Request::Snapshot {
            machine: machine.to_owned(),
            name: name.map(str::to_owned),
        };
        match self.client.call(request)? {
            Reply::Captured(captured) => Ok(captured),
            other => unexpected(&other),
        }
    }

    /// Runs a command that must succeed and returns what it printed.
    fn run(&self, machine: &str, command: &[&str]) -> Result<String> {
        let Finished { code, stdout, stderr } = capture(&self.client, machine, command)?;
        if code != 0 {
            bail!("{command:?} in {machine} ended with {code}: {}", stderr.trim());
        }
        Ok(stdout)
    }
}
