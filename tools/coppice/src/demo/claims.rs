//! What every fork must answer: the state of the captured instant, and then
//! only its own changes.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use super::Demonstration;
use super::guest::Keeper;
use super::story::{MARK_PATH, PARENT};

/// How many forks also run commands that are slow in an emulated guest kernel.
const CLOSER_LOOKS: usize = 3;

/// How far a fork's clock may be off.
const CLOCK_LIMIT_SECONDS: f64 = 1.0;

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
    /// Every fork must answer with the state that only memory held.
    pub(super) fn talk(&mut self, forks: &[String], word: &str, counted: u64) -> Result<()> {
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
    pub(super) fn diverge(&mut self, forks: &[String], word: &str) -> Result<()> {
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
    pub(super) fn look_at_identity(&mut self, forks: &[String]) -> Result<()> {
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
}
