//! The study behind the defaults: frame size, zstd level, dictionary, and
//! fixed pages against content-defined chunks, on real images.
//!
//! ```sh
//! study --group disks=a.raw,b.raw --group memory=a.mem,b.mem --group trees=a.tar,b.tar
//! ```
//!
//! Prints one JSON document; progress goes to standard error. Times are CPU
//! times, so that other work on the host changes them little.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use coppice_benches::frame_study::{self, FrameRow};
use coppice_benches::splitter_study::{self, SplitterRow};
use serde::Serialize;

/// Measures ways to cut and to compress.
#[derive(Debug, Parser)]
struct Options {
    /// A name and the files of one kind, in the order of ingest
    #[arg(long = "group", value_name = "NAME=FILE,FILE", required = true, value_parser = group)]
    groups: Vec<(String, Vec<PathBuf>)>,
    /// Unique pages of each group that are compressed in every way
    #[arg(long, value_name = "MiB", default_value_t = 64)]
    sample: usize,
}

fn group(text: &str) -> Result<(String, Vec<PathBuf>)> {
    let (name, files) = text.split_once('=').context("give NAME=FILE,FILE")?;
    Ok((name.to_owned(), files.split(',').map(PathBuf::from).collect()))
}

#[derive(Debug, Serialize)]
struct Group {
    name: String,
    sample_bytes: usize,
    splitters: Vec<SplitterRow>,
    frames: Vec<FrameRow>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mut groups = Vec::new();
    for (name, files) in &options.groups {
        let say = |what: &str| eprintln!("{name}: {what}");
        let splitters = splitter_study::study(files, &say)?;
        let pages = frame_study::unique_pages(files, options.sample << 20)?;
        let frames = frame_study::study(&pages, &say)?;
        groups.push(Group { name: name.clone(), sample_bytes: pages.len(), splitters, frames });
    }
    println!("{}", serde_json::to_string_pretty(&groups)?);
    Ok(())
}
