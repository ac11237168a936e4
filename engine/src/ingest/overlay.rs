//! Pages taken from an overlay: a sparse file in which they lie where they lie
//! in the image. What the file has no data for is zero, and is not read.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::gather::BATCH_PAGES;
use super::import::next_data;
use super::writer::ImageWriter;
use crate::error::StoreError;
use crate::units::{PAGE_LEN, to_u64, to_usize};

/// Bytes read at once.
const BUFFER_LEN: usize = BATCH_PAGES * PAGE_LEN;

impl ImageWriter<'_> {
    /// Writes `count` pages from `first_page` on as they lie in `overlay`,
    /// which reaches as far as the image.
    ///
    /// # Errors
    /// As [`ImageWriter::write`], or if the file cannot be read.
    pub fn write_overlay(
        &mut self,
        overlay: &File,
        first_page: u64,
        count: u64,
    ) -> Result<(), StoreError> {
        let page_len = to_u64(PAGE_LEN);
        let (mut at, end) = (first_page, first_page.saturating_add(count));
        while at < end {
            let data =
                next_data(overlay, at.saturating_mul(page_len), end.saturating_mul(page_len))
                    .map_err(StoreError::transfer("read overlay"))?;
            let first_data = (data.start / page_len).clamp(at, end);
            self.erase(at, first_data - at)?;
            let data_end = data.end.div_ceil(page_len).clamp(first_data, end);
            self.copy_data(overlay, first_data, data_end)?;
            at = data_end;
        }
        Ok(())
    }

    fn copy_data(&mut self, overlay: &File, first: u64, end: u64) -> Result<(), StoreError> {
        let end = (end * to_u64(PAGE_LEN)).min(self.byte_len());
        let mut at = first * to_u64(PAGE_LEN);
        while at < end {
            let mut bytes = vec![0; to_usize((end - at).min(to_u64(BUFFER_LEN)))];
            overlay.read_exact_at(&mut bytes, at).map_err(StoreError::transfer("read overlay"))?;
            let first_page = at / to_u64(PAGE_LEN);
            at += to_u64(bytes.len());
            self.write_owned(first_page, bytes)?;
        }
        Ok(())
    }
}
