//! One round: every program with a new store, all taking the same step in turn.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::blocks::{self, Drawn};
use super::corpus::{self, Corpus};
use super::measure::{Run, measure, run_unmeasured};
use super::program::Program;
use super::steps::{Step, TURNS};

/// What each program did in a round.
pub(super) type Runs = BTreeMap<Step, Run>;

/// All that a round needs.
#[derive(Debug)]
pub(super) struct Round<'a> {
    pub(super) programs: &'a [Program],
    pub(super) corpus: &'a Corpus,
    pub(super) drawn: &'a Drawn,
    /// A folder for each program is made here, and removed.
    pub(super) folder: &'a Path,
}

impl Round<'_> {
    /// Runs it. Another program begins in each round.
    pub(super) fn run(&self, number: usize, of: u32) -> Result<Vec<Runs>> {
        eprintln!("xtask: round {} of {of}", number + 1);
        for program in self.programs {
            let work = self.work(program);
            remove(&work)?;
            crate::cache::create(&work)?;
            run_unmeasured(program, "making an empty store", &work, &program.init)?;
        }
        let mut all = vec![Runs::new(); self.programs.len()];
        for turn in TURNS {
            for place in 0..self.programs.len() {
                let index = (place + number) % self.programs.len();
                let program = &self.programs[index];
                for step in turn {
                    let run = self.step(program, *step);
                    let run = run.with_context(|| format!("measuring {}", program.name))?;
                    all[index].extend(run.map(|run| (*step, run)));
                }
            }
        }
        self.programs.iter().try_for_each(|program| remove(&self.work(program)))?;
        Ok(all)
    }

    fn work(&self, program: &Program) -> PathBuf {
        self.folder.join(&program.name)
    }

    /// One step of one program; none if it cannot do that.
    fn step(&self, program: &Program, step: Step) -> Result<Option<Run>> {
        let work = self.work(program);
        let Some(script) = self.script(program, step)? else { return Ok(None) };
        std::fs::create_dir_all(work.join("out"))?;
        let run = measure(program, step, &work, &script)?;
        match step {
            Step::Extract | Step::ExtractAgain => self.compare(program, &self.files(step)?)?,
            Step::Read | Step::ReadAgain => {
                let same = std::fs::read(work.join("blocks"))? == blocks::contents(self.drawn)?;
                ensure!(same, "other blocks were read");
            }
            Step::Delete => self.compare_what_is_left(program)?,
            _ => {}
        }
        Ok(Some(run))
    }

    fn script(&self, program: &Program, step: Step) -> Result<Option<String>> {
        let files = self.files(step)?;
        Ok(match step {
            Step::IngestFirst | Step::IngestChanged | Step::IngestOthers => {
                Some(program.ingest("", &files))
            }
            Step::IngestAgain => Some(program.ingest("again-", &files)),
            Step::Extract | Step::ExtractAgain => Some(program.extract(&files)),
            Step::Read | Step::ReadAgain => program.read(self.drawn),
            Step::Delete => Some(program.delete(&files)),
        })
    }

    /// The files that a step is about.
    fn files(&self, step: Step) -> Result<Vec<&PathBuf>> {
        let all = &self.corpus.files;
        ensure!(all.len() > 2, "the corpus needs three files at least");
        Ok(match step {
            Step::IngestFirst => vec![&all[0]],
            Step::IngestChanged => vec![&all[1]],
            Step::IngestOthers => all[2..].iter().collect(),
            Step::Delete => all.iter().step_by(2).collect(),
            _ => all.iter().collect(),
        })
    }

    /// Compares what was extracted, and removes it. The page cache is left to
    /// the store.
    fn compare(&self, program: &Program, files: &[&PathBuf]) -> Result<()> {
        let out = self.work(program).join("out");
        for file in files {
            let extracted = program.extracted(&out, file);
            ensure!(corpus::same(file, &extracted)?, "{} differs", file.display());
            corpus::forget(file);
        }
        remove(&out)
    }

    /// What was not removed can still be extracted; not measured.
    fn compare_what_is_left(&self, program: &Program) -> Result<()> {
        let work = self.work(program);
        let left: Vec<&PathBuf> = self.corpus.files.iter().skip(1).step_by(2).collect();
        std::fs::create_dir_all(work.join("out"))?;
        run_unmeasured(program, "extracting what is left", &work, &program.extract(&left))?;
        self.compare(program, &left)
    }
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}
