//! `cargo xtask bench-peers`: Coppice beside other deduplicating stores, on
//! the same files, in turn, with figures that anyone can take again.
//!
//! Every operation is one shell command under GNU `time`, so that wall and CPU
//! seconds and the largest process count alike for all. All programs take one
//! step before any takes the next, so a noisy host meets all alike. What was
//! extracted or read is compared with what went in.

pub(crate) mod blocks;
mod corpus;
mod figures;
mod measure;
mod plots;
mod program;
pub(crate) mod publish;
mod report;
mod round;
mod steps;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::checkout::Checkout;
use corpus::Corpus;
use program::Program;
use report::{Host, Outcome, Report};
use round::Round;

/// What to compare, and on what.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A folder of files to use instead of the corpus that this command makes
    #[arg(long, value_name = "DIR")]
    corpus: Option<PathBuf>,
    /// Programs to run: coppice, restic, borg, casync, rustic; NAME@LEVEL has
    /// a zstd level of its own
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "coppice,restic,borg,casync,rustic"
    )]
    programs: Vec<String>,
    /// Compress at this zstd level, as far as a program can be told; restic
    /// and casync know only 3
    #[arg(long, value_name = "LEVEL", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=19))]
    zstd_level: u8,
    /// How often all is done
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Where the stores are made [default: a folder beside the cache]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// A table instead of JSON
    #[arg(long)]
    table: bool,
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
        host: Host::this()?,
        corpus_files: corpus.files.len(),
        logical_bytes: corpus.logical_bytes,
        data_bytes: corpus.data_bytes,
        blocks_per_file: blocks::PER_FILE,
        load_averages: Vec::new(),
        programs: programs.iter().map(outcome).collect(),
    };
    let drawn = blocks::draw(&corpus.files)?;
    for number in 0..options.rounds {
        report.load_averages.push(report::load_average()?);
        let round = Round { programs: &programs, corpus: &corpus, drawn: &drawn, folder: &folder };
        let runs = round.run(usize::try_from(number)?, options.rounds)?;
        for (outcome, runs) in report.programs.iter_mut().zip(runs) {
            outcome.add(runs);
        }
    }
    if options.table {
        println!("{}", table::table(&report));
    } else {
        println!("{}", report.json().context("cannot print what was measured")?);
    }
    Ok(())
}

fn outcome(program: &Program) -> Outcome {
    Outcome {
        program: program.name.clone(),
        version: program.version.clone(),
        compression: program.compression.clone(),
        steps: Default::default(),
    }
}
