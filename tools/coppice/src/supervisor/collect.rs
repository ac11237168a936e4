//! Garbage collection for callers.

use std::time::Instant;

use anyhow::Result;
use coppice_engine::{GcOptions, GcStep};

use super::Supervisor;
use crate::rpc::{Collected, Progress, Reply};

impl Supervisor {
    /// Says what a collection would do, and does it unless it is only asked.
    pub(crate) fn collect(
        &self,
        dry_run: bool,
        dead_percent_min: u8,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Reply> {
        let options = GcOptions { dead_percent_min, ..GcOptions::default() };
        if dry_run {
            return Ok(Reply::Planned(self.store.gc_plan(options)?));
        }
        let begun = Instant::now();
        let done = self.store.gc_with(options, &mut |at| report(step(at)))?;
        if let Err(error) = self.pools.follow(&self.store) {
            // The space comes back with the next collection, or with the next
            // page server.
            tracing::warn!(%error, "the page server still holds packs that were collected");
        }
        Ok(Reply::Collected(Collected { report: done, seconds: begun.elapsed().as_secs_f64() }))
    }
}

fn step(at: GcStep) -> Progress {
    let (what, done, total) = match at {
        GcStep::Straighten => ("gathering scattered pages", 0, 0),
        GcStep::Count => ("counting what is needed", 0, 0),
        GcStep::Collect { done, total } => ("collecting", done, total),
    };
    let bytes = total > 0;
    Progress { what: what.to_owned(), done, total, bytes, new_bytes: None }
}
