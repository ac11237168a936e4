//! `cargo xtask bench-peers`: Coppice beside other deduplicating stores, on
//! the same files, in turn, with figures that anyone can take again.
//!
//! Every operation is one shell command under GNU `time`, so that wall and CPU
//! seconds and the largest process count alike for all; the page cache is
//! dropped before each. What was extracted is compared with what went in.

mod corpus;
mod measure;
mod program;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::checkout::Checkout;
use corpus::Corpus;
use measure::{Figures, measure, stored_bytes};
use program::Program;

/// What to compare, and on what.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A folder of files to use instead of the corpus that this command makes
    #[arg(long, value_name = "DIR")]
    corpus: Option<PathBuf>,
    /// Programs to run: coppice, restic, borg, casync, rustic
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "coppice,restic,borg,casync,rustic"
    )]
    programs: Vec<String>,
    /// Where the stores are made [default: a folder beside the cache]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// A table instead of JSON
    #[arg(long)]
    table: bool,
}

/// All that was measured.
#[derive(Debug, Serialize)]
struct Report {
    corpus_files: usize,
    /// Lengths of all files.
    logical_bytes: u64,
    /// Blocks that they take on the disk; the rest is holes.
    data_bytes: u64,
    load_average_before: String,
    programs: Vec<Outcome>,
}

/// What one program did.
#[derive(Debug, Serialize)]
struct Outcome {
    program: String,
    version: String,
    compression: String,
    /// The first file into an empty store.
    ingest_first: Figures,
    /// All others, one after the other.
    ingest_rest: Figures,
    /// All again, unchanged.
    ingest_again: Figures,
    /// All out again.
    extract: Figures,
    stored_bytes_first: u64,
    stored_bytes: u64,
    /// Every second file removed, and its space given back.
    delete: Figures,
    stored_bytes_after_delete: u64,
}

/// Compares, and prints one JSON document.
pub(crate) fn run(checkout: &Checkout, options: &Options) -> Result<()> {
    let corpus = match &options.corpus {
        Some(folder) => Corpus::of(folder)?,
        None => corpus::make(checkout)?,
    };
    let folder = match &options.folder {
        Some(folder) => folder.clone(),
        None => crate::cache::folder()?.join("bench-peers"),
    };
    let programs = program::find(checkout, &options.programs)?;
    let mut report = Report {
        corpus_files: corpus.files.len(),
        logical_bytes: corpus.logical_bytes,
        data_bytes: corpus.data_bytes,
        load_average_before: std::fs::read_to_string("/proc/loadavg")?.trim().to_owned(),
        programs: Vec::new(),
    };
    for program in programs {
        let work = folder.join(&program.name);
        if work.exists() {
            std::fs::remove_dir_all(&work)?;
        }
        crate::cache::create(&work)?;
        let outcome = compare(&program, &corpus, &work);
        std::fs::remove_dir_all(&work)
            .with_context(|| format!("cannot remove {}", work.display()))?;
        report.programs.push(outcome.with_context(|| format!("measuring {}", program.name))?);
    }
    if options.table {
        println!("{}", table::table(&report));
    } else {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(())
}

fn compare(program: &Program, corpus: &Corpus, work: &std::path::Path) -> Result<Outcome> {
    let store = work.join("store");
    let out = work.join("out");
    std::fs::create_dir(&out)?;
    let (first, rest) = corpus.files.split_first().context("the corpus is empty")?;
    let step = |what: &str, script: String| measure(program, what, work, &script);
    step("making an empty store", program.init.clone())?;
    let ingest_first = step("ingesting the first file", program.ingest("", &[first]))?;
    let stored_bytes_first = stored_bytes(&store)?;
    let rest: Vec<&PathBuf> = rest.iter().collect();
    let all: Vec<&PathBuf> = corpus.files.iter().collect();
    let ingest_rest = step("ingesting the others", program.ingest("", &rest))?;
    let stored = stored_bytes(&store)?;
    let ingest_again = step("ingesting all again", program.ingest("again-", &all))?;
    let extract = step("extracting all", program.extract(&all))?;
    for file in &corpus.files {
        ensure!(corpus::same(file, &program.extracted(&out, file))?, "{} differs", file.display());
    }
    let half: Vec<&PathBuf> = corpus.files.iter().step_by(2).collect();
    let delete = step("removing every second file", program.delete(&half))?;
    Ok(Outcome {
        program: program.name.clone(),
        version: program.version.clone(),
        compression: program.compression.to_owned(),
        ingest_first,
        ingest_rest,
        ingest_again,
        extract,
        stored_bytes_first,
        stored_bytes: stored,
        delete,
        stored_bytes_after_delete: stored_bytes(&store)?,
    })
}
