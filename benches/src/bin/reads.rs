//! What reading out of a store costs: an image exported, single pages, and
//! the page map of a large image.
//!
//! Prints one JSON document; progress goes to standard error. An export is
//! measured beside the least that gives the same bytes: the frames of the
//! image read in order, decompressed, hashed once and written, by one thread
//! and by as many as there are CPUs. They take turns, with a cold and with a
//! warm page cache, and the ratios of medians are the result. For single pages
//! the least is reading, decompressing and hashing the frame of the page.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use coppice_engine::{
    Extent, FrameRef, ImageRef, ImportOptions, PAGE_LEN, PageMap, Role, Settings, Store,
};
use serde_json::{Value, json};

/// Bytes of a frame before its stored bytes, as the format has it.
const FRAME_HEADER_LEN: usize = 80;
const FRAME_PLAIN_LEN_MAX: usize = 1 << 20;

/// Measures reading.
#[derive(Debug, Parser)]
struct Options {
    /// A disk to import and export
    #[arg(long, env = "COPPICE_GUEST_DISK")]
    disk: PathBuf,
    /// How often each export is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Single pages read
    #[arg(long, default_value_t = 1000)]
    pages: usize,
    /// Leaves of the image whose page map is built, 128 pages each
    #[arg(long, default_value_t = 10_000)]
    leaves: u64,
    /// Where to make the stores [default: a temporary folder]
    #[arg(long)]
    folder: Option<PathBuf>,
}

fn micros(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn at_rank(times: &[u64], percent: usize) -> u64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len().saturating_sub(1) * percent / 100).copied().unwrap_or(0)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn ratio(one: u64, other: u64) -> f64 {
    one as f64 / other.max(1) as f64
}

fn spread(times: &[u64]) -> Value {
    json!({
        "min_us": at_rank(times, 0), "p50_us": at_rank(times, 50),
        "p99_us": at_rank(times, 99), "count": times.len(),
    })
}

/// The image of a snapshot and its map.
struct Image {
    image: ImageRef,
    map: PageMap,
    packs: Vec<File>,
}

impl Image {
    fn of(store: &Store, name: &str) -> Result<Self> {
        let entry = store.lookup(name)?;
        let roles = [Role::Disk(0), Role::Memory];
        let image = roles.iter().find_map(|role| entry.record.image(*role));
        let image =
            *image.or(entry.record.images.first().map(|(_, image)| image)).context("an image")?;
        let map = store.page_map(&image)?;
        let packs = map.packs().iter().map(|pack| store.pack_file(*pack));
        let packs = packs.collect::<Result<_, _>>()?;
        Ok(Self { image, map, packs })
    }

    fn pack(&self, frame: &FrameRef) -> Result<&File> {
        let at = self.map.packs().binary_search(&frame.pack).ok().context("a pack of the map")?;
        Ok(&self.packs[at])
    }

    /// Lets the kernel forget the packs.
    fn chill(&self) -> Result<()> {
        for pack in &self.packs {
            rustix::fs::fadvise(pack.as_fd(), 0, None, rustix::fs::Advice::DontNeed)?;
        }
        Ok(())
    }

    /// The bare minimum: the plaintext of a frame, hashed once.
    fn bare_frame(
        &self,
        frame: &FrameRef,
        stored: &mut Vec<u8>,
        plain: &mut Vec<u8>,
    ) -> Result<()> {
        stored.resize(usize::try_from(frame.len)?, 0);
        self.pack(frame)?.read_exact_at(stored, frame.offset)?;
        plain.clear();
        if stored[4] == 0 {
            plain.extend_from_slice(&stored[FRAME_HEADER_LEN..]);
        } else {
            plain.reserve(FRAME_PLAIN_LEN_MAX);
            zstd::bulk::Decompressor::new()?
                .decompress_to_buffer(&stored[FRAME_HEADER_LEN..], plain)?;
        }
        std::hint::black_box(blake3::hash(plain));
        Ok(())
    }

    /// The pages of each frame, by frame in the order of the image.
    fn by_frame(&self) -> Vec<(FrameRef, Vec<(u64, u32)>)> {
        let mut numbers = std::collections::HashMap::new();
        let mut frames: Vec<(FrameRef, Vec<(u64, u32)>)> = Vec::new();
        for (page, at) in self.map.stored(0..u64::MAX) {
            let number = *numbers.entry(at.frame).or_insert_with(|| {
                frames.push((at.frame, Vec::new()));
                frames.len() - 1
            });
            frames[number].1.push((page, at.slot));
        }
        frames
    }

    /// The bare minimum of an export.
    fn bare_export(&self, frames: &[(FrameRef, Vec<(u64, u32)>)], out: &File) -> Result<()> {
        let (mut stored, mut plain) = (Vec::new(), Vec::new());
        for (frame, pages) in frames {
            self.bare_frame(frame, &mut stored, &mut plain)?;
            let next =
                |one: &(u64, u32), two: &(u64, u32)| one.0 + 1 == two.0 && one.1 + 1 == two.1;
            for run in pages.chunk_by(next) {
                let slot = usize::try_from(run[0].1)?;
                let bytes = &plain[slot * PAGE_LEN..(slot + run.len()) * PAGE_LEN];
                out.write_all_at(bytes, run[0].0 * u64::try_from(PAGE_LEN)?)?;
            }
        }
        Ok(())
    }
}

fn new_output(folder: &Path, len: u64) -> Result<File> {
    let path = folder.join("out");
    if path.exists() {
        std::fs::remove_file(&path)?;
    }
    let out = File::options().read(true).write(true).create_new(true).open(path)?;
    out.set_len(len)?;
    Ok(out)
}

/// Exports of the same image by the engine and by the bare minimum, in turn.
fn exports(folder: &Path, name: &str, options: &Options) -> Result<Value> {
    let settings = Settings::default();
    let store_dir = folder.join("store");
    let image = Image::of(&Store::open(&store_dir, &settings)?, name)?;
    let frames = image.by_frame();
    let cpus = std::thread::available_parallelism()?.get();
    let part = frames.len().div_ceil(cpus).max(1);
    let mut all = serde_json::Map::new();
    for (cache, is_cold) in [("cold", true), ("warm", false)] {
        let (mut engine, mut one, mut many) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            let ready = || -> Result<File> {
                if is_cold {
                    image.chill()?;
                }
                new_output(folder, image.image.len)
            };
            // Opened anew each time, so that nothing is decoded yet.
            let store = Store::open(&store_dir, &settings)?;
            let (out, begun) = (ready()?, Instant::now());
            store.export(&image.image, &out, &mut |_| {})?;
            engine.push(micros(begun));
            drop(store);
            let (out, begun) = (ready()?, Instant::now());
            image.bare_export(&frames, &out)?;
            one.push(micros(begun));
            let (out, begun) = (ready()?, Instant::now());
            std::thread::scope(|scope| {
                let (image, out) = (&image, &out);
                let work = |part| scope.spawn(move || image.bare_export(part, out));
                let workers: Vec<_> = frames.chunks(part).map(work).collect();
                workers.into_iter().try_for_each(|worker| worker.join().expect("it ends"))
            })?;
            many.push(micros(begun));
        }
        let median = |times: &[u64]| at_rank(times, 50);
        all.insert(cache.to_owned(), json!({
            "engine": spread(&engine), "bare_one_thread": spread(&one), "bare_all_cpus": spread(&many),
            "ratio_to_one_thread": ratio(median(&engine), median(&one)),
            "ratio_to_all_cpus": ratio(median(&engine), median(&many)),
            "mib_per_second": ratio(image.map.stored_pages() * 1_000_000 / 256, median(&engine)),
        }));
        eprintln!("exports with a {cache} page cache measured");
    }
    all.insert("mib_of_data".to_owned(), json!(image.map.stored_pages() / 256));
    all.insert("frames".to_owned(), json!(frames.len()));
    Ok(Value::Object(all))
}

/// One page of each of many frames, all over the image.
fn sample(image: &Image, count: usize) -> Vec<(u64, FrameRef)> {
    let mut firsts: Vec<(u64, FrameRef)> = Vec::new();
    for (frame, pages) in image.by_frame() {
        firsts.push((pages[pages.len() / 2].0, frame));
    }
    // A fixed shuffle: each step is the same part of the golden ratio away.
    let len = firsts.len();
    let step = (len * 618 / 1000) | 1;
    let taken = (0..len.min(count)).map(|at| firsts[at * step % len]);
    let mut seen = std::collections::HashSet::new();
    taken.filter(|(page, _)| seen.insert(*page)).collect()
}

fn single_pages(folder: &Path, name: &str, options: &Options) -> Result<Value> {
    let settings = Settings::default();
    let store = Store::open(&folder.join("store"), &settings)?;
    let image = Image::of(&store, name)?;
    let pages = sample(&image, options.pages);
    let read_all = |store: &Store| -> Result<Vec<u64>> {
        let mut reader = store.reader(&image.image)?;
        let mut out = [0; PAGE_LEN];
        let mut times = Vec::new();
        for (page, _) in &pages {
            let begun = Instant::now();
            reader.read_at(page * u64::try_from(PAGE_LEN)?, &mut out)?;
            times.push(micros(begun));
            std::hint::black_box(&out);
        }
        Ok(times)
    };
    drop(store);
    let store = Store::open(&folder.join("store"), &settings)?;
    image.chill()?;
    let cold = read_all(&store)?;
    drop(store);
    let store = Store::open(&folder.join("store"), &settings)?;
    let warm = read_all(&store)?;
    let cached = read_all(&store)?;
    let mut bare = Vec::new();
    let (mut stored, mut plain) = (Vec::new(), Vec::new());
    for (page, frame) in &pages {
        ensure!(matches!(image.map.extent(*page), Extent::Stored(_)), "a page that is stored");
        let begun = Instant::now();
        image.bare_frame(frame, &mut stored, &mut plain)?;
        bare.push(micros(begun));
    }
    Ok(json!({
        "cold": spread(&cold), "page_cache_warm": spread(&warm), "decoded": spread(&cached),
        "bare_page_cache_warm": spread(&bare),
        "warm_to_bare_p50_ratio": ratio(at_rank(&warm, 50), at_rank(&bare, 50)),
    }))
}

/// Pages that are all different and compress to almost nothing.
fn large_image(store: &Store, leaves: u64) -> Result<ImageRef> {
    let mut session = store.begin()?;
    let pages = leaves * 128;
    let page_len = u64::try_from(PAGE_LEN)?;
    let mut writer = session.image(pages * page_len, None)?;
    let mut bytes = vec![0; 128 * PAGE_LEN];
    for leaf in 0..leaves {
        for (at, page) in (1_u64..).zip(bytes.chunks_mut(PAGE_LEN)) {
            page[..8].copy_from_slice(&(leaf * 128 + at).to_le_bytes());
        }
        writer.write(leaf * 128, &bytes)?;
    }
    let image = writer.finish()?;
    let record = coppice_engine::SnapshotRecord {
        images: vec![(Role::Memory, image)],
        config: Vec::new(),
        parent: None,
    };
    session.commit(&record, coppice_engine::CommitOptions::default())?;
    Ok(image)
}

fn page_maps(folder: &Path, leaves: u64) -> Result<Value> {
    let settings = Settings::default();
    let dir = folder.join("large");
    let store = Store::open(&dir, &settings)?;
    let image = large_image(&store, leaves)?;
    eprintln!("an image of {leaves} leaves made");
    let timed = |store: &Store| -> Result<(u64, u64)> {
        let before = store.lookups()?.index_gets;
        let begun = Instant::now();
        std::hint::black_box(store.page_map(&image)?);
        let took = micros(begun);
        Ok((took, store.lookups()?.index_gets - before))
    };
    let again = |store: Store| -> Result<Store> {
        drop(store);
        Ok(Store::open(&dir, &settings)?)
    };
    let store = again(store)?;
    let (first, first_gets) = timed(&store)?;
    let (second, _) = timed(&store)?;
    let hints = store.lookups()?;
    store.forget_hints()?;
    let store = again(store)?;
    let (without, without_gets) = timed(&store)?;
    Ok(json!({
        "leaves": leaves,
        "opened_us": first, "opened_index_gets": first_gets,
        "again_us": second,
        "without_hints_us": without, "without_hints_index_gets": without_gets,
        "hint_bytes_per_chunk": ratio(hints.hint_bytes, leaves * 128),
    }))
}

fn main() -> Result<()> {
    let options = Options::parse();
    let temporary = tempfile::tempdir()?;
    let folder = options.folder.clone().unwrap_or_else(|| temporary.path().to_owned());
    let store = Store::open(&folder.join("store"), &Settings::default())?;
    let disk = File::open(&options.disk).context("the disk")?;
    let begun = Instant::now();
    let import = ImportOptions::default();
    let name = store.import(&disk, "disk".parse()?, import, &mut |_| {})?.name.to_string();
    let import_us = micros(begun);
    rustix::fs::sync();
    drop(store);
    let exports = exports(&folder, &name, &options)?;
    let single_pages = single_pages(&folder, &name, &options)?;
    let page_maps = page_maps(&folder, options.leaves)?;
    let report = json!({
        "import_us": import_us,
        "export": exports,
        "single_page": single_pages,
        "page_map": page_maps,
    });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
