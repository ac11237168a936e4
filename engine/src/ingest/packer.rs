//! From plain frames to packs: compressed on all cores, appended in order.
//!
//! ```text
//! put -> compressing (all cores, oldest first) -> appender (a thread) -> pack
//! ```
//!
//! Invariants: each stage holds a bounded number of bytes, whatever the input
//! and however slow the disk. Where a pack ends depends on the frames alone,
//! not on how many cores there are or how fast they were: the length of
//! a frame counts when it leaves the first queue, which is when a fixed number
//! came after it.

use std::collections::VecDeque;
use std::sync::Arc;

use super::appender::{Appender, failed_before};
use super::frames::PlainFrame;
use super::task::{self, Task};
use crate::depot::{Depot, LeafNotes, Novelty, SessionPins};
use crate::error::StoreError;
use crate::pack::frame::{self, EncodedFrame};
use crate::settings::Settings;
use crate::units::{to_u64, to_usize};

/// Plaintext that is being compressed, in bytes; and compressed bytes that
/// wait to be written.
const STAGE_LEN_MAX: usize = 8 << 20;

/// The way from frames to packs.
#[derive(Debug)]
pub(super) struct Packer {
    depot: Arc<Depot>,
    pins: Arc<SessionPins>,
    settings: Settings,
    compressing: VecDeque<Task<EncodedFrame>>,
    appender: Option<Appender>,
    /// Of the frames of the open pack that left the first queue.
    content_len: u64,
    /// Of all its frames.
    objects: u64,
    /// Packs that were ordered to be sealed and are not known to be.
    sealing: usize,
}

impl Packer {
    pub(super) fn new(depot: Arc<Depot>, pins: Arc<SessionPins>, settings: Settings) -> Self {
        Self {
            depot,
            pins,
            settings,
            compressing: VecDeque::new(),
            appender: None,
            content_len: 0,
            objects: 0,
            sealing: 0,
        }
    }

    /// Frames of full length that fit into one stage.
    fn frames_in_stage(&self) -> usize {
        (STAGE_LEN_MAX / self.settings.frame_len_max).max(2)
    }

    /// Frames that may be compressed at once. Fewer if packs are short, or
    /// they would not stay short.
    pub(super) fn waiting_frames(&self) -> usize {
        let pack_len = to_usize(self.settings.pack_len_max);
        (pack_len / 4 / self.settings.frame_len_max).clamp(1, self.frames_in_stage())
    }

    /// Adds a frame to the open pack.
    pub(super) fn put(&mut self, frame: PlainFrame) -> Result<(), StoreError> {
        self.objects += to_u64(frame.keys.len());
        let level = self.settings.zstd_level;
        self.compressing.push_back(task::begin(move || {
            frame::encode(frame.kind, &frame.plain, frame.keys, level)
        }));
        while self.compressing.len() > self.waiting_frames() {
            self.pass_on()?;
        }
        Ok(())
    }

    /// Whether the open pack is long enough to be sealed.
    pub(super) fn is_full(&self) -> bool {
        self.content_len >= self.settings.pack_len_max
            || self.objects >= u64::from(self.settings.pack_objects_max)
    }

    /// Waits for the oldest frame and hands it to the appender.
    fn pass_on(&mut self) -> Result<(), StoreError> {
        let Some(task) = self.compressing.pop_front() else { return Ok(()) };
        let frame = task.wait();
        self.content_len += to_u64(frame.bytes.len());
        let waiting = self.frames_in_stage();
        let appender = match &mut self.appender {
            Some(appender) => appender,
            none => none.insert(Appender::start(self.depot.clone(), self.pins.clone(), waiting)?),
        };
        appender.append(frame)
    }

    /// Ends the open pack, if there is one: it is made durable and published
    /// while the next one is filled. The notes are of its leaves.
    pub(super) fn end_pack(
        &mut self,
        notes: LeafNotes,
        novelty: Option<Novelty>,
    ) -> Result<(), StoreError> {
        while !self.compressing.is_empty() {
            self.pass_on()?;
        }
        if self.content_len > 0 {
            self.appender()?.seal(notes, novelty)?;
            self.sealing += 1;
            self.content_len = 0;
            self.objects = 0;
        }
        Ok(())
    }

    /// The appender, which is there once something was handed to it.
    fn appender(&mut self) -> Result<&mut Appender, StoreError> {
        self.appender.as_mut().ok_or_else(failed_before)
    }

    /// Waits until at most `left` packs are not published yet; returns the
    /// bytes of those that are now.
    pub(super) fn wait_sealed(&mut self, left: usize) -> Result<u64, StoreError> {
        let mut file_lens = 0;
        while self.sealing > left {
            file_lens += self.appender()?.sealed()?;
            self.sealing -= 1;
        }
        Ok(file_lens)
    }
}
