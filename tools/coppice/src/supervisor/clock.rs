//! The clocks the supervisor reads, in one place.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC` in nanoseconds, comparable between processes.
pub(crate) fn monotonic_ns() -> Result<u64> {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec)?;
    Ok(seconds * 1_000_000_000 + u64::try_from(now.tv_nsec)?)
}

/// Wall clock in nanoseconds since 1970.
pub(crate) fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
