//! A thread that appends a session's frames to its packs and seals them, so
//! that neither writing nor flushing keeps anyone from compressing.
//!
//! Orders are obeyed one after the other. The first that fails is the last:
//! the unfinished pack is thrown away, and the error is told to whoever gives
//! the next order or waits for an answer.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use crate::depot::{Depot, LeafNotes, Novelty, SessionPins};
use crate::error::StoreError;
use crate::pack::PackWriter;
use crate::pack::frame::EncodedFrame;

/// What a session says that could not write what it was given.
pub(super) fn failed_before() -> StoreError {
    StoreError::Invalid("an earlier write of this session failed; begin another")
}

enum Order {
    Append(EncodedFrame),
    Seal(LeafNotes, Option<Novelty>),
}

/// The near end of the thread.
#[derive(Debug)]
pub(super) struct Appender {
    /// `None` once it has failed.
    orders: Option<SyncSender<Order>>,
    sealed: Receiver<u64>,
    thread: Option<JoinHandle<Result<(), StoreError>>>,
}

impl Appender {
    /// Starts the thread; so many orders may wait for it.
    pub(super) fn start(
        depot: Arc<Depot>,
        pins: Arc<SessionPins>,
        waiting: usize,
    ) -> Result<Self, StoreError> {
        let (orders, received) = sync_channel(waiting);
        let (answers, sealed) = channel();
        let thread = std::thread::Builder::new()
            .name("append".to_owned())
            .spawn(move || obey(&depot, &pins, &received, &answers))
            .map_err(StoreError::transfer("start a thread"))?;
        Ok(Self { orders: Some(orders), sealed, thread: Some(thread) })
    }

    /// Orders a frame to be appended to the open pack.
    pub(super) fn append(&mut self, frame: EncodedFrame) -> Result<(), StoreError> {
        self.order(Order::Append(frame))
    }

    /// Orders the open pack to be made durable and published.
    pub(super) fn seal(
        &mut self,
        notes: LeafNotes,
        novelty: Option<Novelty>,
    ) -> Result<(), StoreError> {
        self.order(Order::Seal(notes, novelty))
    }

    /// Waits until the oldest pack that was ordered to be sealed is published;
    /// says how long its file is.
    pub(super) fn sealed(&mut self) -> Result<u64, StoreError> {
        self.sealed.recv().map_err(|_| self.failure())
    }

    fn order(&mut self, order: Order) -> Result<(), StoreError> {
        let sent = self.orders.as_ref().is_some_and(|orders| orders.send(order).is_ok());
        if sent { Ok(()) } else { Err(self.failure()) }
    }

    /// Why the thread ended; known once.
    fn failure(&mut self) -> StoreError {
        self.orders = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => error,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            Some(Ok(Ok(()))) | None => failed_before(),
        }
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        self.orders = None;
        // An error that nobody asked for belongs to a session that is given up.
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            tracing::debug!(%error, "a session that was given up could not write");
        }
    }
}

/// The pack that is being written; thrown away unless it is taken out.
struct OpenPack<'d> {
    depot: &'d Depot,
    writer: Option<PackWriter>,
}

impl OpenPack<'_> {
    fn append(&mut self, frame: &EncodedFrame) -> Result<(), StoreError> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => none.insert(self.depot.begin_pack()?),
        };
        writer.append(frame)
    }
}

impl Drop for OpenPack<'_> {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take() {
            self.depot.abandon(writer.path());
        }
    }
}

fn obey(
    depot: &Depot,
    pins: &SessionPins,
    orders: &Receiver<Order>,
    answers: &Sender<u64>,
) -> Result<(), StoreError> {
    let mut open = OpenPack { depot, writer: None };
    for order in orders {
        match order {
            Order::Append(frame) => open.append(&frame)?,
            Order::Seal(mut notes, novelty) => {
                let file_len = match open.writer.take() {
                    Some(writer) => depot.publish_noted(writer, Some(pins), novelty, &mut notes)?.1,
                    None => 0,
                };
                if answers.send(file_len).is_err() {
                    break;
                }
            }
        }
    }
    Ok(())
}
