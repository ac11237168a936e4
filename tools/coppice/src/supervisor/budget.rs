//! How much memory the pools may take.
//!
//! The goal is what the caller said, or half of the host's memory. While the
//! host is short of memory it is less: what the pools hold now, minus what
//! the host lacks. It rises again with what is free. The page server does the
//! dropping (`fault::keeper`); a new one is told the goal at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use coppice_runtime::host::Pager;

use super::Supervisor;
use super::machine::lock;
use crate::host_memory;

/// How often the host's memory is looked at.
const TICK: Duration = Duration::from_secs(1);

/// Of the host's memory, this part is to stay available.
const RESERVE: u64 = 16;

/// Share of time, in hundredths of a percent, in which tasks waited for memory
/// over the last 10 seconds, from which on pools give some back.
const STALLED: u64 = 1000;

/// The budget of one supervisor's pools, in bytes.
#[derive(Debug)]
pub(crate) struct Budget {
    goal: u64,
    now: AtomicU64,
    /// The page server that was told, and what.
    told: Mutex<Option<(u32, u64)>>,
}

/// The host's memory, in bytes.
#[derive(Debug, Clone, Copy)]
struct Host {
    total: u64,
    available: u64,
    /// See [`STALLED`].
    stalled: u64,
}

impl Budget {
    /// So many MiB, or half of the host's memory.
    pub(crate) fn new(mib: Option<u64>) -> Self {
        let half = || host_memory::total().map_or(u64::MAX, |total| total / 2);
        let goal = mib.map_or_else(half, |mib| mib.saturating_mul(1 << 20));
        Self { goal, now: AtomicU64::new(goal), told: Mutex::new(None) }
    }

    /// What is allowed now.
    pub(crate) fn bytes(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    /// Tells a page server, unless it knows.
    pub(crate) fn tell(&self, pager: &Pager) -> Result<()> {
        let now = (pager.pid(), self.bytes());
        let mut told = lock(&self.told);
        if *told != Some(now) {
            pager.set_budget(now.1)?;
            *told = Some(now);
        }
        Ok(())
    }

    /// Looks at the host, and at what the pools hold if it is short of memory.
    fn follow(&self, pager: &Pager) -> Result<()> {
        let host = Host {
            total: host_memory::total()?,
            available: host_memory::available()?,
            stalled: host_memory::stalled(),
        };
        let now = if host.is_short() {
            let held = pager.stats()?.0.iter().map(|(_, pool)| pool.resident_pages * 4096).sum();
            self.bytes().min(allowed(self.goal, held, host))
        } else {
            // Slowly, or what was given back is taken again at once.
            self.bytes().saturating_add(host.total / 64).min(self.goal)
        };
        self.now.store(now, Ordering::Relaxed);
        self.tell(pager)
    }
}

impl Host {
    fn is_short(self) -> bool {
        self.available < self.total / RESERVE || self.stalled >= STALLED
    }
}

/// What pools that hold so much may take on a host that is short of memory.
fn allowed(goal: u64, held: u64, host: Host) -> u64 {
    let lacking = (host.total / RESERVE).saturating_sub(host.available);
    let stalled = if host.stalled >= STALLED { held / 8 } else { 0 };
    held.saturating_sub(lacking.max(stalled)).min(goal)
}

impl Supervisor {
    /// Follows the host's memory for as long as the process lives.
    pub(crate) fn follow_memory(&self) {
        loop {
            std::thread::sleep(TICK);
            let Some(pager) = self.running_pager() else { continue };
            if let Err(error) = self.budget.follow(&pager) {
                tracing::debug!(%error, "the budget of the pools stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn pools_give_back_what_the_host_lacks() {
        let host = Host { total: 16 * GIB, available: 8 * GIB, stalled: 0 };
        assert!(!host.is_short());
        let short = Host { available: GIB / 2, ..host };
        assert!(short.is_short());
        assert_eq!(allowed(8 * GIB, 4 * GIB, short), 4 * GIB - GIB / 2);
        assert_eq!(allowed(GIB, 4 * GIB, short), GIB, "never more than the goal");
        assert_eq!(allowed(8 * GIB, GIB / 4, short), 0);
        let stalled = Host { stalled: STALLED, ..host };
        assert!(stalled.is_short());
        assert_eq!(allowed(8 * GIB, 4 * GIB, stalled), 4 * GIB - GIB / 2);
    }

    #[test]
    fn the_goal_is_what_was_said() {
        assert_eq!(Budget::new(Some(3)).bytes(), 3 << 20);
        assert_eq!(Budget::new(Some(u64::MAX)).bytes(), u64::MAX);
        assert!(Budget::new(None).bytes() > 0);
    }
}
