//! Page maps: where every page of an image lies, physically.
//!
//! A map is what the page server needs to answer faults without an index. It
//! is ordered by page, and it also knows for each frame which pages of the
//! image lie in it.

use std::ops::Range;

use crate::id::{ChunkId, PackId};
use crate::units::{PAGE_LEN, pages_of, to_u32, to_usize};

/// A frame in a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameRef {
    /// Which pack.
    pub pack: PackId,
    /// Bytes from the start of the pack.
    pub offset: u64,
    /// Bytes of header and stored bytes.
    pub len: u32,
    /// Pages in the frame.
    pub count: u32,
}

impl FrameRef {
    /// Stands for the frame of a chunk that is in no pack: who reads it is told
    /// that the pack is unknown, and all other pages of the image can be had.
    pub(crate) const NOWHERE: Self = Self { pack: PackId(0), offset: 16, len: 80, count: 1 };
}

/// A page that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// What it must hash to.
    pub chunk: ChunkId,
    /// Its frame.
    pub frame: FrameRef,
    /// Its number among the pages of the frame.
    pub slot: u32,
}

/// What an image has at a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Zeros, which are not stored; also beyond the image's end.
    Zero,
    /// A chunk.
    Stored(Location),
}

/// A page of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) page: u32,
    /// Index into the frames.
    pub(super) frame: u32,
    pub(super) slot: u32,
    pub(super) chunk: ChunkId,
}

/// Where all pages of an image that are not zero lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageMap {
    len: u64,
    packs: Vec<PackId>,
    frames: Vec<FrameRef>,
    /// Ascending by page.
    rows: Vec<Row>,
    /// For each frame, where its rows begin in `by_frame`; one more at the end.
    frame_starts: Vec<u32>,
    /// Row numbers, grouped by frame and ascending in each group.
    by_frame: Vec<u32>,
}

impl PageMap {
    /// Puts a map together. The rows are ascending by page, and name frames
    /// and slots that exist.
    pub(super) fn new(len: u64, frames: Vec<FrameRef>, rows: Vec<Row>) -> Self {
        let mut packs: Vec<PackId> = frames.iter().map(|frame| frame.pack).collect();
        packs.sort_unstable();
        packs.dedup();
        packs.retain(|pack| *pack != FrameRef::NOWHERE.pack);
        let (frame_starts, by_frame) = group_by_frame(frames.len(), &rows);
        Self { len, packs, frames, rows, frame_starts, by_frame }
    }

    /// Length of the image in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "the length of an image, not of a collection")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Pages of the image, zero or not.
    #[must_use]
    pub fn pages(&self) -> u64 {
        pages_of(self.len)
    }

    /// Pages that are stored.
    #[must_use]
    pub fn stored_pages(&self) -> u64 {
        crate::units::to_u64(self.rows.len())
    }

    /// All packs in which pages lie, ascending.
    #[must_use]
    pub fn packs(&self) -> &[PackId] {
        &self.packs
    }

    /// All frames in which pages lie.
    #[must_use]
    pub fn frames(&self) -> &[FrameRef] {
        &self.frames
    }

    /// Whether it is of the same image: every page is the same chunk, wherever
    /// that lies.
    #[must_use]
    pub fn shows_the_same_as(&self, other: &Self) -> bool {
        let same = |(one, other): (&Row, &Row)| one.page == other.page && one.chunk == other.chunk;
        self.len == other.len
            && self.rows.len() == other.rows.len()
            && self.rows.iter().zip(&other.rows).all(same)
    }

    /// What the image has at a page.
    #[must_use]
    pub fn extent(&self, page: u64) -> Extent {
        match self.row_of(page) {
            Some(number) => Extent::Stored(self.location(&self.rows[number])),
            None => Extent::Zero,
        }
    }

    /// The stored pages of a range, ascending.
    pub fn stored(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Location)> + '_ {
        let from = self.rows.partition_point(|row| u64::from(row.page) < range.start);
        let rows = self.rows[from..].iter();
        rows.take_while(move |row| u64::from(row.page) < range.end)
            .map(|row| (u64::from(row.page), self.location(row)))
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    fn location(&self, row: &Row) -> Location {
        let frame = self.frames[to_usize(u64::from(row.frame))];
        Location { chunk: row.chunk, frame, slot: row.slot }
    }

    /// The number of the page's row.
    pub(super) fn row_of(&self, page: u64) -> Option<usize> {
        let page = u32::try_from(page).ok()?;
        self.rows.binary_search_by_key(&page, |row| row.page).ok()
    }

    /// The rows that lie in the same frame as this one, at most `limit`, the
    /// nearest pages. The row itself is among them.
    pub(super) fn companions(&self, number: usize, limit: usize) -> impl Iterator<Item = &Row> {
        let frame = to_usize(u64::from(self.rows[number].frame));
        let start = to_usize(u64::from(self.frame_starts[frame]));
        let end = to_usize(u64::from(self.frame_starts[frame + 1]));
        let group = &self.by_frame[start..end];
        let own = group.partition_point(|other| to_usize(u64::from(*other)) < number);
        let from = own.saturating_sub(limit / 2).min(group.len().saturating_sub(limit));
        let nearest = &group[from..group.len().min(from + limit)];
        nearest.iter().map(|number| &self.rows[to_usize(u64::from(*number))])
    }
}

fn group_by_frame(frames: usize, rows: &[Row]) -> (Vec<u32>, Vec<u32>) {
    let mut starts = vec![0_u32; frames + 1];
    for row in rows {
        starts[to_usize(u64::from(row.frame)) + 1] += 1;
    }
    for frame in 0..frames {
        starts[frame + 1] += starts[frame];
    }
    let mut next = starts.clone();
    let mut by_frame = vec![0_u32; rows.len()];
    for (number, row) in rows.iter().enumerate() {
        let slot = &mut next[to_usize(u64::from(row.frame))];
        by_frame[to_usize(u64::from(*slot))] = to_u32(number);
        *slot += 1;
    }
    (starts, by_frame)
}

const _: () = assert!(PAGE_LEN == 4096);
