//! Sessions: everything that becomes one snapshot.

use std::sync::Arc;

use super::sink::Sink;
use super::stream::StreamWriter;
use super::writer::ImageWriter;
use crate::catalog::Catalog;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::lease::Lease;
use crate::settings::Settings;
use crate::tree::ImageRef;
use crate::units::{IMAGE_LEN_MAX, to_u64};

/// Writes images and commits them as one snapshot. Several sessions may be
/// open at once. One that is dropped leaves nothing in the catalog.
#[derive(Debug)]
pub struct Session {
    pub(super) sink: Sink,
    pub(super) catalog: Arc<Catalog>,
    pub(super) settings: Settings,
    /// Keeps the images that it builds on.
    pub(super) leases: Vec<Lease>,
}

impl Session {
    pub(crate) fn new(
        depot: Arc<Depot>,
        catalog: Arc<Catalog>,
        settings: Settings,
    ) -> Result<Self, StoreError> {
        depot.check_fence()?;
        Ok(Self { sink: Sink::new(depot, settings.clone()), catalog, settings, leases: Vec::new() })
    }

    /// Begins an image of `len` bytes. Pages that are not written stay as in
    /// `base`, which must be committed, or are zero.
    ///
    /// # Errors
    /// If the image is too long, or shorter than its base, or the base cannot
    /// be read.
    pub fn image(
        &mut self,
        len: u64,
        base: Option<&ImageRef>,
    ) -> Result<ImageWriter<'_>, StoreError> {
        if len > IMAGE_LEN_MAX {
            return Err(StoreError::ImageTooLong(len));
        }
        if let Some(base) = base {
            self.keep(base)?;
        }
        let base = base.map(|base| self.sink.depot().root(base)).transpose()?;
        if base.is_some_and(|base| base.len > len) {
            return Err(StoreError::Invalid("an image cannot be shorter than its base"));
        }
        ImageWriter::sized(&mut self.sink, len, base.as_ref())
    }

    /// Keeps an image that this session did not make from being collected.
    pub(super) fn keep(&mut self, image: &ImageRef) -> Result<(), StoreError> {
        if !self.sink.made(image) {
            let depot = self.sink.depot();
            let lease = Lease::take(depot, &self.catalog, &[*image])?;
            self.leases.push(lease);
        }
        Ok(())
    }

    /// Begins an image of pages whose length is what will have been appended.
    pub fn growing_image(&mut self) -> ImageWriter<'_> {
        ImageWriter::unbounded(&mut self.sink)
    }

    /// Begins a byte stream, which is cut by content.
    pub fn stream(&mut self) -> StreamWriter<'_> {
        StreamWriter::new(&mut self.sink)
    }

    /// Stores a short byte string as an image.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn blob(&mut self, bytes: &[u8]) -> Result<ImageRef, StoreError> {
        let mut writer = self.image(to_u64(bytes.len()), None)?;
        writer.write(0, bytes)?;
        writer.finish()
    }
}
