//! What a machine has written to a disk: overlays, one on the other.
//!
//! ```text
//! newest    . . 7 . . . 3 .     written to
//! frozen    . 5 2 . . . . .     of the last capture
//! frozen    . 1 . . 4 . . .
//! image     0 0 0 0 0 0 0 0     the pool
//! shown     0 5 7 0 4 0 3 0
//! ```
//!
//! Invariant: a block's current contents lie in the newest overlay that has its
//! bit. A frozen overlay never changes, so others may read it at the same time;
//! folding replaces some by one that shows the same.

use std::fs::File;
use std::sync::Arc;

use crate::protocol::PageRun;

/// Why overlays do not fit.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OverlayError {
    /// Blocks behind the end of the disk.
    #[error("blocks {first}..+{count} of an overlay lie outside the disk")]
    Range {
        /// First block.
        first: u64,
        /// Number of blocks.
        count: u64,
    },
    /// Overlays that are not there, or not frozen.
    #[error("{count} overlays cannot be folded, {frozen} are frozen")]
    Fold {
        /// How many were meant.
        count: usize,
        /// How many there are.
        frozen: usize,
    },
}

/// The overlays of one disk.
#[derive(Debug)]
pub(super) struct Overlays {
    blocks: usize,
    /// The oldest first.
    frozen: Vec<Overlay>,
    newest: Overlay,
}

/// Blocks that were written.
#[derive(Debug)]
pub(super) struct Overlay {
    file: Arc<File>,
    written: BlockSet,
}

impl Overlays {
    /// An empty overlay over frozen ones, the oldest first.
    pub(super) fn new(
        blocks: usize,
        frozen: Vec<(File, &Vec<PageRun>)>,
        newest: File,
    ) -> Result<Self, OverlayError> {
        let frozen: Result<Vec<Overlay>, OverlayError> =
            frozen.into_iter().map(|(file, runs)| Overlay::new(blocks, file, runs)).collect();
        Ok(Self { blocks, frozen: frozen?, newest: Overlay::empty(blocks, newest) })
    }

    /// The one that is written to.
    pub(super) fn newest(&self) -> &Overlay {
        &self.newest
    }

    /// Says that the newest has these blocks.
    pub(super) fn insert(&mut self, first: u64, count: u64) {
        self.newest.written.insert(first, count);
    }

    /// The file that has a block, unless that is the image.
    pub(super) fn holder(&self, block: u64) -> Option<Arc<File>> {
        std::iter::once(&self.newest)
            .chain(self.frozen.iter().rev())
            .find(|overlay| overlay.written.contains(block))
            .map(Overlay::file)
    }

    /// Puts an overlay on top, unless the newest holds nothing yet.
    pub(super) fn freeze(&mut self, file: File) {
        if !self.newest.written.is_empty() {
            let new = Overlay::empty(self.blocks, file);
            self.frozen.push(std::mem::replace(&mut self.newest, new));
        }
    }

    /// Replaces the `count` oldest, which are frozen, by one that shows the
    /// same.
    pub(super) fn fold(
        &mut self,
        count: usize,
        file: File,
        runs: &[PageRun],
    ) -> Result<(), OverlayError> {
        let frozen = self.frozen.len();
        if count > frozen {
            return Err(OverlayError::Fold { count, frozen });
        }
        let new = Overlay::new(self.blocks, file, runs)?;
        self.frozen.splice(..count, [new]);
        Ok(())
    }
}

impl Overlay {
    fn empty(blocks: usize, file: File) -> Self {
        Self { file: Arc::new(file), written: BlockSet::new(blocks) }
    }

    fn new(blocks: usize, file: File, runs: &[PageRun]) -> Result<Self, OverlayError> {
        let mut overlay = Self::empty(blocks, file);
        for PageRun { first, count } in runs.iter().copied() {
            if first.checked_add(count).is_none_or(|end| end > blocks as u64) {
                return Err(OverlayError::Range { first, count });
            }
            overlay.written.insert(first, count);
        }
        Ok(overlay)
    }

    /// Its file.
    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// The blocks that it has.
    pub(super) fn runs(&self) -> Vec<PageRun> {
        self.written.runs()
    }
}

/// One bit per block.
#[derive(Debug)]
struct BlockSet {
    words: Vec<u64>,
}

impl BlockSet {
    fn new(blocks: usize) -> Self {
        Self { words: vec![0; blocks.div_ceil(64)] }
    }

    fn place(block: u64) -> (usize, u64) {
        (usize::try_from(block / 64).unwrap_or(usize::MAX), 1 << (block % 64))
    }

    fn contains(&self, block: u64) -> bool {
        let (word, bit) = Self::place(block);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    fn insert(&mut self, first: u64, count: u64) {
        for block in first..first + count {
            let (word, bit) = Self::place(block);
            self.words[word] |= bit;
        }
    }

    fn runs(&self) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        for (index, word) in self.words.iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                let block = index as u64 * 64 + u64::from(left.trailing_zeros());
                left &= left - 1;
                match runs.last_mut() {
                    Some(run) if run.first + run.count == block => run.count += 1,
                    _ => runs.push(PageRun { first: block, count: 1 }),
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::super::disk::{Disk, DiskError};
    use super::*;

    const BLOCKS: usize = 16;
    const LEN: usize = BLOCKS * 4096;

    fn empty() -> File {
        let overlay = tempfile::tempfile().unwrap();
        overlay.set_len(LEN as u64).unwrap();
        overlay
    }

    fn image() -> (File, Vec<u8>) {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut pool = File::from(rustix::fs::memfd_create("p", flags).unwrap());
        let bytes: Vec<u8> = (0..LEN).map(|at| 100 + (at / 512).to_le_bytes()[0]).collect();
        pool.write_all(&bytes).unwrap();
        (pool, bytes)
    }

    /// A disk, what it must show, and what it must have shown when its
    /// overlays were frozen.
    struct Model {
        pool: File,
        disk: Disk,
        shown: Vec<u8>,
        /// With the files and the blocks that the owner of the machine holds.
        frozen: Vec<(File, Vec<PageRun>, Vec<u8>)>,
        newest: File,
    }

    impl Model {
        fn new() -> Self {
            let (pool, shown) = image();
            let newest = empty();
            let overlay = newest.try_clone().unwrap();
            let disk = Disk::new(LEN as u64, false, &pool, overlay, Vec::new()).unwrap();
            Self { pool, disk, shown, frozen: Vec::new(), newest }
        }

        fn write(&mut self, at: usize, len: usize, byte: u8) {
            let blocks = self.disk.prepare(at as u64, &vec![byte; len]).unwrap();
            self.disk.commit(&blocks).unwrap();
            self.shown[at..at + len].fill(byte);
        }

        fn erase(&mut self, at: usize, len: usize) {
            let erasure = self.disk.prepare_erase(at as u64, len as u64).unwrap();
            self.disk.erase(&erasure).unwrap();
            self.shown[at..at + len].fill(0);
        }

        fn freeze(&mut self) {
            let runs = self.disk.overlay_runs();
            let new = empty();
            self.disk.freeze(new.try_clone().unwrap());
            if !runs.is_empty() {
                let file = std::mem::replace(&mut self.newest, new);
                self.frozen.push((file, runs, self.shown.clone()));
            }
        }

        /// Folds the oldest, as the owner does: from what it holds itself.
        fn fold(&mut self, count: usize) {
            let count = count.min(self.frozen.len());
            if count == 0 {
                return;
            }
            let (file, mut set) = (empty(), BlockSet::new(BLOCKS));
            for (from, runs, _) in &self.frozen[..count] {
                for run in runs {
                    let mut bytes = vec![0; usize::try_from(run.count).unwrap() * 4096];
                    from.read_exact_at(&mut bytes, run.first * 4096).unwrap();
                    file.write_all_at(&bytes, run.first * 4096).unwrap();
                    set.insert(run.first, run.count);
                }
            }
            self.disk.fold(count, file.try_clone().unwrap(), &set.runs()).unwrap();
            let shown = self.frozen[count - 1].2.clone();
            self.frozen.splice(..count, [(file, set.runs(), shown)]);
        }

        fn check(&self) {
            let mut bytes = vec![0; LEN];
            self.disk.read(0, &mut bytes).unwrap();
            assert!(bytes == self.shown, "the disk shows what was written");
            for count in 0..=self.frozen.len() {
                let below = &self.frozen[..count];
                let files =
                    below.iter().map(|(file, runs, _)| (file.try_clone().unwrap(), runs)).collect();
                let child = Disk::new(LEN as u64, false, &self.pool, empty(), files).unwrap();
                child.read(0, &mut bytes).unwrap();
                let shown = below.last().map_or_else(|| image().1, |(_, _, shown)| shown.clone());
                assert!(bytes == shown, "a child shows instant {count}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_instant_stays_what_it_was(
            steps in prop::collection::vec((0..8_u8, 0..LEN / 512, 1..40_usize, 1..90_u8), 1..40)
        ) {
            let mut model = Model::new();
            for (what, sector, sectors, byte) in steps {
                let (at, len) = (sector * 512, (sectors * 512).min(LEN - sector * 512));
                match what {
                    0..4 => model.write(at, len, byte),
                    4 | 5 => model.erase(at, len),
                    6 => model.freeze(),
                    _ => model.fold(sectors % 4),
                }
            }
            model.check();
        }
    }

    #[test]
    fn a_write_that_was_prepared_before_a_freeze_goes_to_the_new_overlay() {
        let mut model = Model::new();
        model.write(4096, 4096, 1);
        let blocks = model.disk.prepare(4096 + 512, &[2; 512]).unwrap();
        model.freeze();
        model.disk.commit(&blocks).unwrap();
        model.shown[4096 + 512..4096 + 1024].fill(2);
        model.check();
        let erasure = model.disk.prepare_erase(4096 + 1024, 8192).unwrap();
        model.freeze();
        model.disk.erase(&erasure).unwrap();
        model.shown[4096 + 1024..4096 + 1024 + 8192].fill(0);
        model.check();
    }

    #[test]
    fn an_overlay_without_blocks_is_not_frozen() {
        let mut model = Model::new();
        model.freeze();
        model.freeze();
        model.write(0, 512, 1);
        model.check();
        assert!(model.frozen.is_empty());
    }

    #[test]
    fn what_is_not_frozen_is_not_folded_and_nothing_lies_outside() {
        let mut model = Model::new();
        model.write(0, 512, 1);
        model.freeze();
        model.write(0, 512, 2);
        let refused = |result| matches!(result, Err(DiskError::Overlays(_)));
        assert!(refused(model.disk.fold(2, empty(), &[])));
        let outside = vec![PageRun { first: 15, count: 2 }];
        assert!(refused(model.disk.fold(1, empty(), &outside)));
        model.check();
        let files = vec![(empty(), &outside)];
        assert!(Disk::new(LEN as u64, false, &model.pool, empty(), files).is_err());
    }
}
