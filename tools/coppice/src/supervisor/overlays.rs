//! What a machine has written to a disk: overlays, one on the other.
//!
//! A capture freezes the newest and puts an empty one on top. Frozen overlays
//! never change, so children share them with their parent.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::{Context, Result};
use coppice_runtime::pieces::{Piece, with_layer};
use coppice_runtime::protocol::{PAGE_SIZE, PageRun};

use super::Supervisor;
use super::capture::alive;
use super::freeze::Instant;
use super::machine::{Live, Machine, lock};

/// Frozen overlays of a disk that are kept apart; more are folded into one.
const FROZEN_MAX: usize = 8;

const BLOCK: usize = 4096;
/// Blocks that are copied at once.
const BATCH_BLOCKS: usize = 256;

/// An overlay that does not change any more.
#[derive(Debug)]
pub(crate) struct FrozenOverlay {
    /// When it was frozen.
    pub(crate) instant: Instant,
    /// Read-only: other machines get it too.
    pub(crate) file: File,
    /// The blocks that it holds.
    pub(crate) runs: Vec<PageRun>,
}

/// The overlays of one disk.
#[derive(Debug)]
pub(crate) struct Stack {
    /// The oldest first.
    pub(crate) frozen: Vec<Arc<FrozenOverlay>>,
    /// The one that is written to.
    pub(crate) newest: OpenOverlay,
    len: u64,
}

/// An overlay that its machine may write to.
#[derive(Debug)]
pub(crate) struct OpenOverlay {
    pub(crate) file: File,
    /// The same, read-only.
    reader: File,
}

impl Stack {
    /// An empty overlay over frozen ones.
    pub(crate) fn new(
        machine: &Machine,
        index: usize,
        len: u64,
        frozen: &[Arc<FrozenOverlay>],
    ) -> Result<Self> {
        let path = machine.folder.join(format!("disk{index}.overlay"));
        Ok(Self { frozen: frozen.to_vec(), newest: OpenOverlay::new(make(&path, len)?)?, len })
    }

    /// An overlay that may become the newest. It has no name: it goes when
    /// nobody has it open.
    pub(crate) fn spare(&self, machine: &Machine, index: usize) -> Result<OpenOverlay> {
        OpenOverlay::new(unnamed(machine, index, self.len)?)
    }

    /// Puts an overlay on top of the newest, which holds these blocks.
    pub(crate) fn freeze(&mut self, instant: Instant, runs: Vec<PageRun>, spare: OpenOverlay) {
        if !runs.is_empty() {
            let OpenOverlay { reader, .. } = std::mem::replace(&mut self.newest, spare);
            self.frozen.push(Arc::new(FrozenOverlay { instant, file: reader, runs }));
        }
    }

    /// All of its files.
    pub(crate) fn files(&self) -> impl Iterator<Item = &File> {
        self.frozen.iter().map(|overlay| &overlay.file).chain([&self.newest.file])
    }
}

impl OpenOverlay {
    fn new(file: File) -> Result<Self> {
        let reader = read_only(&file)?;
        Ok(Self { file, reader })
    }
}

impl AsFd for OpenOverlay {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Which of the overlays, the oldest first, has the current contents of which
/// blocks.
pub(crate) fn holders(overlays: &[&FrozenOverlay], len: u64) -> Vec<(PageRun, usize)> {
    let pages = len.div_ceil(PAGE_SIZE);
    let mut pieces = Piece::whole(pages, None);
    for (index, overlay) in overlays.iter().enumerate() {
        pieces = with_layer(&pieces, &overlay.runs, &Some(index), pages, usize::MAX);
    }
    pieces.into_iter().filter_map(|piece| Some((piece.run, piece.pool?))).collect()
}

impl Supervisor {
    /// Folds the overlays of a machine that are in the store up to `covered`,
    /// where there are many: reading must not slow down with each capture.
    pub(crate) fn fold_overlays(&self, machine: &Machine, covered: Instant) -> Result<()> {
        let _turn = lock(&machine.turn);
        let live = alive(machine)?;
        let disks = lock(&live.disks).len();
        for index in 0..disks {
            fold(machine, &live, index, covered)?;
        }
        Ok(())
    }
}

fn fold(machine: &Machine, live: &Live, index: usize, covered: Instant) -> Result<()> {
    let (old, len) = {
        let disks = lock(&live.disks);
        let stack = &disks[index];
        let old = stack.frozen.iter().take_while(|overlay| overlay.instant <= covered);
        (old.cloned().collect::<Vec<_>>(), stack.len)
    };
    if old.len() <= FROZEN_MAX {
        return Ok(());
    }
    let Some(instant) = old.last().map(|newest| newest.instant) else { return Ok(()) };
    let overlays: Vec<&FrozenOverlay> = old.iter().map(AsRef::as_ref).collect();
    let file = unnamed(machine, index, len)?;
    let mut runs: Vec<PageRun> = Vec::new();
    for (run, holder) in holders(&overlays, len) {
        copy(&overlays[holder].file, &file, run)?;
        match runs.last_mut() {
            Some(last) if last.first + last.count == run.first => last.count += run.count,
            _ => runs.push(run),
        }
    }
    let file = read_only(&file)?;
    let (disk, count) = (u32::try_from(index)?, u32::try_from(old.len())?);
    live.vmm.fold(disk, count, runs.clone(), file.as_fd())?;
    let one = Arc::new(FrozenOverlay { instant, file, runs });
    lock(&live.disks)[index].frozen.splice(..old.len(), [one]);
    Ok(())
}

/// Copies blocks into an empty file; zeros stay holes, as a guest that gave
/// them back left them.
fn copy(from: &File, to: &File, run: PageRun) -> Result<()> {
    let mut buffer = vec![0; BATCH_BLOCKS * BLOCK];
    let (mut first, end) = (run.first, run.first + run.count);
    while first < end {
        let count = (BATCH_BLOCKS as u64).min(end - first);
        let bytes = &mut buffer[..usize::try_from(count)? * BLOCK];
        from.read_exact_at(bytes, first * PAGE_SIZE)?;
        for (block, bytes) in (first..).zip(bytes.chunks(BLOCK)) {
            if bytes.iter().any(|byte| *byte != 0) {
                to.write_all_at(bytes, block * PAGE_SIZE)?;
            }
        }
        first += count;
    }
    Ok(())
}

/// The same file, read-only.
fn read_only(file: &File) -> Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .context("cannot open an overlay for reading")
}

fn unnamed(machine: &Machine, index: usize, len: u64) -> Result<File> {
    let path = machine.folder.join(format!("disk{index}.next"));
    let file = make(&path, len)?;
    std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    Ok(file)
}

/// A sparse file of whole blocks.
fn make(path: &std::path::Path, len: u64) -> Result<File> {
    let file = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(len.next_multiple_of(PAGE_SIZE))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frozen_overlay_cannot_be_written() {
        let open = OpenOverlay::new(tempfile::tempfile().unwrap()).unwrap();
        open.file.write_all_at(&[7; 4096], 4096).unwrap();
        open.reader.write_all_at(&[8; 4096], 4096).unwrap_err();
        let mut block = [0; 4096];
        open.reader.read_exact_at(&mut block, 4096).unwrap();
        assert_eq!(block, [7; 4096]);
    }

    #[test]
    fn zeros_stay_holes_when_overlays_are_folded() {
        use std::os::unix::fs::MetadataExt;
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        for file in [&from, &to] {
            file.set_len(4 << 20).unwrap();
        }
        from.write_all_at(&[7; 4096], 3 << 20).unwrap();
        copy(&from, &to, PageRun { first: 0, count: 1024 }).unwrap();
        assert!(to.metadata().unwrap().blocks() * 512 <= 64 << 10);
        let mut block = [0; 4096];
        to.read_exact_at(&mut block, 3 << 20).unwrap();
        assert_eq!(block, [7; 4096]);
    }

    #[test]
    fn the_newest_overlay_holds_a_block() {
        let overlay = |instant, runs: &[(u64, u64)]| FrozenOverlay {
            instant: Instant(instant),
            file: tempfile::tempfile().unwrap(),
            runs: runs
                .iter()
                .map(|(first, count)| PageRun { first: *first, count: *count })
                .collect(),
        };
        let (old, new) = (overlay(1, &[(0, 4), (9, 1)]), overlay(2, &[(2, 1), (5, 2)]));
        let held: Vec<(u64, u64, usize)> = holders(&[&old, &new], 10 * 4096)
            .into_iter()
            .map(|(run, holder)| (run.first, run.count, holder))
            .collect();
        assert_eq!(held, [(0, 2, 0), (2, 1, 1), (3, 1, 0), (5, 2, 1), (9, 1, 0)]);
    }
}
