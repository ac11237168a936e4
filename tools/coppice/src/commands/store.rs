//! Commands about what the store holds.

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use coppice_engine::RepairReport;
use serde::Serialize;

use super::lineage;
use crate::cli::{Check, Export, Import, ImportAs};
use crate::client::{Client, unexpected, with_file};
use crate::output::{Bar, Output, bytes, table};
use crate::rpc::{Checked, Part, Reply, Request, Scope, Shown, SnapshotLine, Usage};

pub(super) fn import(client: &Client, options: &Import, out: Output) -> Result<()> {
    let file = open_input(&options.file)?;
    let request = Request::Import {
        name: options.name.clone(),
        stream: options.kind == ImportAs::Stream,
        format: options.format,
    };
    let backing = options.backing.iter().map(|path| open_input(path));
    let backing = backing.collect::<Result<Vec<File>>>()?;
    let files: Vec<_> = std::iter::once(&file).chain(&backing).map(AsFd::as_fd).collect();
    let bar = Bar::new();
    let (reply, _) = client.ask(request, &files, &mut |step| bar.show(&step))?;
    drop(bar);
    let Reply::Imported(done) = reply else { return unexpected(&reply) };
    out.print(&done, || {
        format!(
            "{}: {} read, {} new, {} stored, in {:.1} s",
            done.name,
            bytes(done.logical_bytes),
            bytes(done.new_bytes),
            bytes(done.stored_bytes),
            done.seconds
        )
    })
}

/// Stands for standard input or output.
const STANDARD: &str = "-";

fn open_input(path: &Path) -> Result<File> {
    if path.as_os_str() == STANDARD {
        let input = std::io::stdin();
        return Ok(File::from(input.as_fd().try_clone_to_owned().context("no standard input")?));
    }
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    if file.metadata()?.is_dir() {
        bail!("{} is a folder: give a disk image or another file", path.display());
    }
    Ok(file)
}

pub(super) fn export(client: &Client, options: &Export, out: Output) -> Result<()> {
    let part = match (options.memory, options.kernel, options.disk) {
        (true, _, _) => Part::Memory,
        (_, true, _) => Part::Kernel,
        (_, _, Some(index)) => Part::Disk(index),
        (_, _, None) => Part::Main,
    };
    if options.file.as_os_str() == STANDARD {
        return pour(client, &options.name, part);
    }
    let file = new_output(&options.file)?;
    let bar = Bar::new();
    let request = Request::Export { name: options.name.clone(), part, in_order: false };
    let answer = client.ask(request, &with_file(&file), &mut |step| bar.show(&step));
    drop(bar);
    written(answer.map(|(reply, _)| reply), &options.file, out)
}

/// Writes to standard output. What there is to tell goes to standard error.
fn pour(client: &Client, name: &str, part: Part) -> Result<()> {
    let out = std::io::stdout();
    if out.is_terminal() {
        bail!("standard output is a terminal: send the bytes to a file or another program");
    }
    let file = File::from(out.as_fd().try_clone_to_owned().context("no standard output")?);
    let bar = Bar::new();
    let request = Request::Export { name: name.to_owned(), part, in_order: true };
    let (reply, _) = client.ask(request, &with_file(&file), &mut |step| bar.show(&step))?;
    drop(bar);
    let Reply::Exported { bytes: count, seconds } = reply else { return unexpected(&reply) };
    eprintln!("{name}: {} written in {seconds:.1} s", bytes(count));
    Ok(())
}

pub(super) fn dump_memory(
    client: &Client,
    machine: String,
    path: &Path,
    out: Output,
) -> Result<()> {
    let file = new_output(path)?;
    let request = Request::DumpMemory { machine };
    let answer = client.ask(request, &with_file(&file), &mut |_| {});
    written(answer.map(|(reply, _)| reply), path, out)
}

/// Makes a file that is not there yet: an existing one is never overwritten.
fn new_output(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("cannot make {}", path.display()))
}

#[derive(Serialize)]
struct Written {
    file: String,
    logical_bytes: u64,
    seconds: f64,
}

/// Reports a written file; one that was not finished is removed.
fn written(answer: Result<Reply>, path: &Path, out: Output) -> Result<()> {
    let (logical_bytes, seconds) = match answer {
        Ok(Reply::Exported { bytes, seconds }) => (bytes, seconds),
        Ok(other) => return unexpected(&other),
        Err(error) => {
            std::fs::remove_file(path)
                .with_context(|| format!("cannot remove the unfinished {}", path.display()))?;
            return Err(error);
        }
    };
    let done = Written { file: path.display().to_string(), logical_bytes, seconds };
    out.print(&done, || {
        format!("{}: {} written in {:.1} s", done.file, bytes(logical_bytes), seconds)
    })
}

#[derive(Serialize)]
struct Snapshots {
    snapshots: Vec<SnapshotLine>,
}

pub(super) fn snapshots(client: &Client, out: Output) -> Result<()> {
    let reply = client.call(Request::Snapshots)?;
    let Reply::Snapshots(snapshots) = reply else { return unexpected(&reply) };
    let all = Snapshots { snapshots };
    out.print(&all, || {
        let mut rows = vec![heading(&["NAME", "KIND", "ID", "SIZE", "ADDED", "PARENT"])];
        rows.extend(all.snapshots.iter().map(|line| {
            let named = line.name != line.id;
            vec![
                if named { line.name.clone() } else { "-".to_owned() },
                line.kind.clone(),
                short(&line.id),
                bytes(line.logical_bytes),
                bytes(line.stored_bytes),
                line.parent.as_deref().map(short).unwrap_or_default(),
            ]
        }));
        table(&rows)
    })
}

pub(super) fn heading(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Enough of an id to tell it from others.
pub(super) fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// A document with the bill that was asked for beside it.
#[derive(Serialize)]
struct Billed<'d, T> {
    #[serde(flatten)]
    document: &'d T,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

pub(super) fn show(client: &Client, name: String, usage: bool, out: Output) -> Result<()> {
    let reply = client.call(Request::Show { name: name.clone() })?;
    let Reply::Shown(shown) = reply else { return unexpected(&reply) };
    let usage = if usage { Some(lineage::usage(client, Some(name))?) } else { None };
    let billed = Billed { document: &*shown, usage };
    out.print(&billed, || {
        let bill = billed.usage.as_ref().and_then(|usage| usage.snapshot.as_ref());
        shown_text(&shown) + &bill.map_or_else(String::new, lineage::snapshot_bill)
    })
}

fn shown_text(shown: &Shown) -> String {
    let line = &shown.snapshot;
    let mut text = format!(
        "id        {}\nkind      {}\nnames     {}\nparent    {}\nadded     {}\n",
        line.id,
        line.kind,
        shown.names.join(", "),
        line.parent.as_deref().unwrap_or("none"),
        bytes(line.stored_bytes),
    );
    if let Some(machine) = &shown.machine {
        text.push_str(&format!(
            "machine   {} CPU, {} memory\n",
            machine.vcpus,
            bytes(machine.memory_bytes)
        ));
    }
    let mut rows = vec![heading(&["PART", "SIZE", "DATA", "ROOT"])];
    rows.extend(shown.images.iter().map(|image| {
        vec![
            image.part.clone(),
            bytes(image.logical_bytes),
            bytes(image.data_bytes),
            image.root.clone(),
        ]
    }));
    text.push('\n');
    text.push_str(&table(&rows));
    text
}

#[derive(Serialize)]
struct Done {
    ok: bool,
}

pub(super) fn done(client: &Client, request: Request, out: Output) -> Result<()> {
    match client.call(request)? {
        Reply::Done => out.print(&Done { ok: true }, String::new),
        other => unexpected(&other),
    }
}

pub(super) fn tag(client: &Client, name: String, new: String, out: Output) -> Result<()> {
    done(client, Request::Tag { name, new }, out)
}

#[derive(Serialize)]
struct Removed {
    removed: Vec<String>,
}

pub(super) fn rmi(client: &Client, names: Vec<String>, out: Output) -> Result<()> {
    for name in &names {
        client.call(Request::RemoveSnapshot { name: name.clone() })?;
    }
    let all = Removed { removed: names };
    out.print(&all, || all.removed.join("\n"))
}

pub(super) fn stats(client: &Client, usage: bool, out: Output) -> Result<()> {
    let reply = client.call(Request::Stats)?;
    let Reply::Stats(stats) = reply else { return unexpected(&reply) };
    let usage = if usage { Some(lineage::usage(client, None)?) } else { None };
    let billed = Billed { document: &stats, usage };
    out.print(&billed, || {
        let text = format!(
            "logical     {}\nunique      {} in {} chunks\nstored      {} in {} packs\nsnapshots   {}\n",
            bytes(stats.logical_bytes),
            bytes(stats.unique_bytes),
            stats.chunks,
            bytes(stats.stored_bytes),
            stats.packs,
            stats.snapshots
        );
        let twice = stats.kept_twice_bytes.map(|twice| format!("kept twice  {}\n", bytes(twice)));
        let text = text + &twice.unwrap_or_default();
        text + &billed.usage.as_ref().map_or_else(String::new, lineage::store_bill)
    })
}

/// Fails if anything is damaged, after saying what.
pub(super) fn check(client: &Client, options: &Check, out: Output) -> Result<ExitCode> {
    let scope = match (options.structure, options.sample) {
        (true, _) => Scope::Structure,
        (false, None) => Scope::Full,
        (false, Some(percent)) => {
            let seed = options.seed.map_or_else(getrandom::u64, Ok)?;
            Scope::Sample { percent, seed }
        }
    };
    let bar = Bar::new();
    let request = if options.repair { Request::Repair } else { Request::Check(scope) };
    let (reply, _) = client.ask(request, &[], &mut |step| bar.show(&step))?;
    drop(bar);
    let Reply::Checked(found) = reply else { return unexpected(&reply) };
    out.print(&found, || checked_text(&found))?;
    if found.ok {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "coppice: the store is damaged in {} places: what is named above cannot be restored; import or capture it again",
        found.problems.len()
    );
    Ok(ExitCode::FAILURE)
}

fn repaired_text(repaired: &RepairReport) -> String {
    let mut text = String::new();
    for pack in &repaired.quarantined {
        text.push_str(&format!("pack {pack} was put aside into quarantine/\n"));
    }
    for pack in &repaired.busy {
        text.push_str(&format!("pack {pack} is in use by an ingest: repair again later\n"));
    }
    if !repaired.quarantined.is_empty() {
        text.push_str(&format!(
            "{} objects of them are kept, {} frames are lost\n",
            repaired.salvaged_objects, repaired.lost_frames
        ));
    }
    text
}

fn checked_text(found: &Checked) -> String {
    let mut text = found.repaired.as_ref().map_or_else(String::new, repaired_text);
    for problem in &found.problems {
        let hit = match problem.snapshots.as_slice() {
            [] => "no snapshot needs it".to_owned(),
            names => format!("hits {}", names.join(", ")),
        };
        text.push_str(&format!("{}; {hit}\n", problem.what));
    }
    if found.healed_frames > 0 {
        text.push_str(&format!(
            "{} damaged frames hold nothing that is not found sound elsewhere; `coppice check --repair` puts their packs aside\n",
            found.healed_frames
        ));
    }
    text.push_str(&format!(
        "{}: {} packs, {} chunks, {} verified in {:.1} s\n",
        if found.ok { "clean" } else { "damaged" },
        found.packs,
        found.chunks,
        if found.scope == Scope::Full { bytes(found.bytes) } else { "metadata".to_owned() },
        found.seconds
    ));
    match found.scope {
        Scope::Full => {}
        Scope::Structure => text.push_str("no page was read\n"),
        Scope::Sample { percent, seed } => text.push_str(&format!(
            "{percent} % of the pages were drawn by seed {seed}; {} frames were not read\n",
            found.skipped_frames
        )),
    }
    text
}
