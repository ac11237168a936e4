//! The story: a machine from its disk to its captured instant, and the order
//! of all chapters.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Demonstration;
use super::guest::{Keeper, PORT, PROGRAM};
use crate::client::{unexpected, with_file};
use crate::commands::exec::{Finished, capture, send_file};
use crate::output::{bytes, micros};
use crate::rpc::{Boot, Captured, Fork, Forked, Reply, Request};

const DISK: &str = "root-disk";
pub(super) const PARENT: &str = "parent";
pub(super) const INSTANT: &str = "instant";
const KEEPER_PATH: &str = "/root/keeper.py";
pub(super) const MARK_PATH: &str = "/root/mark";

/// How long the process in the guest may take to start.
const KEEPER_LIMIT: Duration = Duration::from_secs(120);

impl Demonstration<'_> {
    /// Tells it from the beginning to the end.
    pub(super) fn tell(&mut self) -> Result<()> {
        self.figures.host_available_before_bytes = crate::host_memory::available()?;
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
        let format = crate::rpc::ImportFormat::Raw;
        let request = Request::Import { name: DISK.to_owned(), stream: false, format };
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
            nets: Vec::new(),
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

    pub(super) fn fork(&self, name: &str, paused: bool) -> Result<Forked> {
        let request = Request::Fork(Fork {
            source: INSTANT.to_owned(),
            count: 1,
            name: Some(name.to_owned()),
            paused,
            snapshot_only: true,
            nets: Vec::new(),
            prefetch: true,
        });
        match self.client.call(request)? {
            Reply::Forked(forked) => Ok(forked),
            other => unexpected(&other),
        }
    }

    pub(super) fn snapshot(&self, machine: &str, name: Option<&str>) -> Result<Captured> {
        let request = Request::Snapshot {
            machine: machine.to_owned(),
            name: name.map(str::to_owned),
            cold: false,
        };
        match self.client.call(request)? {
            Reply::Captured(captured) => Ok(captured),
            other => unexpected(&other),
        }
    }

    /// Runs a command that must succeed and returns what it printed.
    pub(super) fn run(&self, machine: &str, command: &[&str]) -> Result<String> {
        let Finished { code, stdout, stderr } = capture(&self.client, machine, command)?;
        if code != 0 {
            bail!("{command:?} in {machine} ended with {code}: {}", stderr.trim());
        }
        Ok(stdout)
    }
}
