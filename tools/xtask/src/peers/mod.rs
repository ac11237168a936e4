//! `cargo xtask bench-peers`: Coppice beside other deduplicating stores, on
//! the same files, in turn, with figures that anyone can take again.
//!
//! Every operation is one shell command under GNU `time`, so that wall and CPU
//! seconds and the largest process count alike for all; the page cache is
//! dropped before each. What was extracted is compared with what went in.

pub(crate) mod blocks;
mod corpus;
mod measure;
pub(crate) mod plots;
mod program;
mod table;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::checkout::Checkout;
use corpus::Corpus;
use measure::{Figures, measure, measure_warm, stored_bytes};
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
    /// Compress at this zstd level, as far as a program can be told [default:
    /// 1; restic and casync know only 3]
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(u8).range(1..=19))]
    zstd_level: Option<u8>,
    /// Where the stores are made [default: a folder beside the cache]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// A table instead of JSON
    #[arg(long)]
    table: bool,
}

/// All that was measured.
#[derive(Debug, Serialize, Deserialize)]
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
#[derive(Debug, Serialize, Deserialize)]
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
    /// And once more, with what the page cache has from before.
    extract_again: Figures,
    /// Blocks of 4 KiB read at random.
    blocks_read: usize,
    /// What that took, with what it takes to begin and to end; none if the
    /// program cannot.
    read: Option<Figures>,
    /// The same blocks once more, with what the page cache has.
    read_again: Option<Figures>,
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
    let programs = program::find(checkout, &options.programs, options.zstd_level)?;
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

fn compare(program: &Program, corpus: &Corpus, work: &Path) -> Result<Outcome> {
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
    std::fs::remove_dir_all(&out)?;
    std::fs::create_dir(&out)?;
    let extract_again = measure_warm(program, "extracting again", work, &program.extract(&all))?;
    let drawn = blocks::draw(&corpus.files)?;
    let (read, read_again) = read_blocks(program, work, &drawn)?;
    let half: Vec<&PathBuf> = corpus.files.iter().step_by(2).collect();
    let delete = step("removing every second file", program.delete(&half))?;
    Ok(Outcome {
        program: program.name.clone(),
        version: program.version.clone(),
        compression: program.compression.clone(),
        ingest_first,
        ingest_rest,
        ingest_again,
        extract,
        extract_again,
        blocks_read: drawn.values().map(Vec::len).sum(),
        read,
        read_again,
        stored_bytes_first,
        stored_bytes: stored,
        delete,
        stored_bytes_after_delete: stored_bytes(&store)?,
    })
}

/// Reads the drawn blocks, cold and once more, and compares them.
fn read_blocks(
    program: &Program,
    work: &Path,
    drawn: &BTreeMap<PathBuf, Vec<u64>>,
) -> Result<(Option<Figures>, Option<Figures>)> {
    let Some(script) = program.read(drawn) else { return Ok((None, None)) };
    let expected = blocks::contents(drawn)?;
    let checked = |figures: Figures| {
        ensure!(std::fs::read(work.join("blocks"))? == expected, "other blocks were read");
        Ok(Some(figures))
    };
    let cold = checked(measure(program, "reading blocks", work, &script)?)?;
    let warm = checked(measure_warm(program, "reading blocks again", work, &script)?)?;
    Ok((cold, warm))
}
