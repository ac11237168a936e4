//! The story, chapter by chapter.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, Seek};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
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

/// A fork that has answered its first command.
struct Grown {
    ready_us: u64,
    reply_us: u64,
    machine_id: String,
}

/// What a fork's process said.
struct Answers {
    word: String,
    count: u64,
    random: String,
    clock_off: f64,
}

/// Seconds since 1970.
fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// How far a clock is off that was read at some moment between two others.
fn clock_off(before: f64, theirs: f64, after: f64) -> f64 {
    (before - theirs).max(theirs - after).max(0.0)
}

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
        let (reply, _) = self.client.ask(Request::Boot(boot), &with_file(&kernel), &mut |_| {})?;
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
        getrandom::fill(&mut random)
            .map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
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

    /// Grows the forks, as many at a time as the host has CPUs. Each is timed
    /// from its own request to the reply to its first command.
    fn regrow(&mut self) -> Result<Vec<String>> {
        let count = self.options.forks;
        if count == 0 {
            bail!("--forks must be at least 1");
        }
        self.say(&format!("regrowing it as {count} forks, lazily, from the store"));
        let names: Vec<String> = (1..=count).map(|number| format!("fork-{number}")).collect();
        // The first alone: it is the one that fills the pool.
        let mut grown = vec![self.grow(&names[0])?];
        self.say("the first fork answers");
        grown.extend(self.in_parallel("forks answer", &names[1..], |name| self.grow(name))?);
        let of =
            |field: fn(&Grown) -> u64| Spread::of(&grown.iter().map(field).collect::<Vec<_>>());
        self.figures.fork_ready_us = of(|fork| fork.ready_us);
        self.figures.fork_reply_us = of(|fork| fork.reply_us);
        let ids: BTreeSet<&str> = grown.iter().map(|fork| fork.machine_id.as_str()).collect();
        let detail = format!("{} machine ids for {} forks", ids.len(), names.len());
        self.check("every fork has an identity of its own", ids.len() == names.len(), detail);
        Ok(names)
    }

    fn grow(&self, name: &str) -> Result<Grown> {
        let begun = Instant::now();
        let fork = self.fork(name, false)?;
        let machine = fork.machines.first().context("no fork was made")?;
        let machine_id = self.run(name, &["cat", "/etc/machine-id"])?;
        let reply_us = u64::try_from(begun.elapsed().as_micros())?;
        Ok(Grown { ready_us: machine.ready_us, reply_us, machine_id })
    }

    /// Does the same with every machine, on as many threads as there are
    /// CPUs, and says now and then how far it is.
    fn in_parallel<T: Send>(
        &self,
        what: &str,
        names: &[String],
        work: impl Fn(&String) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let workers = std::thread::available_parallelism().map_or(2, usize::from).min(names.len());
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = work(name);
                        let failed = result.is_err();
                        let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                        results.push(result);
                        let done = results.len();
                        drop(results);
                        if done.is_multiple_of(10) || done == names.len() {
                            self.say(&format!("{done} of {} {what}", names.len()));
                        }
                        if failed {
                            next.store(names.len(), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        results.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().collect()
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
        let answers = self.in_parallel("forks asked", forks, |name| self.question(name))?;
        let all = forks.len();
        let recalled = answers.iter().filter(|answer| answer.word == word).count();
        self.check(
            "state that lived only in memory answers in every fork",
            recalled == all,
            format!("{recalled} of {all} recall {word}"),
        );
        // "recall" and "count" itself came since the captured instant.
        let continued = answers.iter().filter(|answer| answer.count == counted + 2).count();
        self.check(
            "every fork continues from the captured instant",
            continued == all,
            format!("{continued} of {all} went on counting from {counted}"),
        );
        let random: BTreeSet<&str> = answers.iter().map(|answer| answer.random.as_str()).collect();
        self.check(
            "forks draw different random bytes",
            random.len() == all,
            format!("{} different draws of 16 bytes from {all} forks", random.len()),
        );
        let off = answers.iter().map(|answer| answer.clock_off).fold(0.0, f64::max);
        self.check(
            "every fork's clock is right",
            off < CLOCK_LIMIT_SECONDS,
            format!("at most {off:.3} s off"),
        );
        Ok(())
    }

    fn question(&self, name: &str) -> Result<Answers> {
        let mut keeper = Keeper::connect(&self.client, name)?;
        let word = keeper.ask("recall")?;
        let count = keeper.ask("count")?.parse()?;
        let random = keeper.ask("random")?;
        let asked = now()?;
        let theirs: f64 = keeper.ask("time")?.parse()?;
        Ok(Answers { word, count, random, clock_off: clock_off(asked, theirs, now()?) })
    }

    /// Changes a variable in every fork and a file in some; nobody else may
    /// see it.
    fn diverge(&mut self, forks: &[String], word: &str) -> Result<()> {
        self.say("letting the forks diverge");
        self.in_parallel("forks changed", forks, |name| {
            let mut keeper = Keeper::connect(&self.client, name)?;
            keeper.ask(&format!("mark {name}"))?;
            keeper.ask(&format!("remember {name}"))
        })?;
        let own = self.in_parallel("forks compared", forks, |name| {
            let mut keeper = Keeper::connect(&self.client, name)?;
            Ok(keeper.ask("marks")? == *name && keeper.ask("recall")? == *name)
        })?;
        let own = own.into_iter().filter(|own| *own).count();
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
            let script = "cat /proc/sys/kernel/hostname; head -c 16 /dev/urandom | od -An -tx1";
            let text = self.run(name, &["sh", "-c", script])?;
            let (host, draw) = text.split_once('\n').context("the fork said too little")?;
            names.insert(host.to_owned());
            draws.insert(draw.to_owned());
        }
        let first = forks.first().context("there is no fork")?;
        let asked = now()?;
        let theirs: f64 = self.run(first, &["date", "+%s.%N"])?.trim().parse()?;
        let off = clock_off(asked, theirs, now()?);
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
        let request =
            Request::Snapshot { machine: machine.to_owned(), name: name.map(str::to_owned) };
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
