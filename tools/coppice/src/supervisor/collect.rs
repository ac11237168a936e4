//! Garbage collection for callers.

use std::time::Instant;

use anyhow::Result;
use coppice_engine::GcOptions;

use super::Supervisor;
use crate::rpc::{Collected, Reply};

impl Supervisor {
    /// Says what a collection would do, and does it unless it is only asked.
    pub(crate) fn collect(&self, dry_run: bool, dead_percent_min: u8) -> Result<Reply> {
        let options = GcOptions { dead_percent_min, ..GcOptions::default() };
        if dry_run {
            return Ok(Reply::Planned(self.store.gc_plan(options)?));
        }
        let begun = Instant::now();
        let report = self.store.gc(options)?;
        Ok(Reply::Collected(Collected { report, seconds: begun.elapsed().as_secs_f64() }))
    }
}
