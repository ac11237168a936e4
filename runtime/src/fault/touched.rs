//! Which pages a machine touched first, when nobody had touched them before.
//!
//! This is what the next machine that continues from the same instant on an
//! empty pool will need, and in which order. It is noted for a while only:
//! what a machine does later is its own affair.

use std::collections::HashSet;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::protocol::PoolId;

/// How long touches are noted, from the first one on.
pub(crate) const NOTED_FOR: Duration = Duration::from_secs(30);

/// How many are noted.
const NOTED_MAX: usize = 1 << 15;

/// The first touches of a machine.
#[derive(Debug, Default)]
pub(super) struct Touched {
    since: OnceLock<Instant>,
    noted: Mutex<Noted>,
}

#[derive(Debug, Default)]
struct Noted {
    order: Vec<(PoolId, u64)>,
    /// A thread that the kernel cannot put to sleep asks again and again.
    seen: HashSet<(PoolId, u64)>,
}

impl Touched {
    /// Notes that the machine needed a page that was not there.
    pub(super) fn note(&self, pool: PoolId, page: u64) {
        if self.since.get_or_init(Instant::now).elapsed() > NOTED_FOR {
            return;
        }
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.order.len() < NOTED_MAX && noted.seen.insert((pool, page)) {
            noted.order.push((pool, page));
        }
    }

    /// All that was noted, in the order of the touches.
    pub(super) fn pages(&self) -> Vec<(PoolId, u64)> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).order.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touches_keep_their_order_and_their_bound() {
        let touched = Touched::default();
        let (memory, disk) = (PoolId(1), PoolId(2));
        for (pool, page) in [(memory, 7), (disk, 7), (memory, 3), (memory, 7), (disk, 0)] {
            touched.note(pool, page);
        }
        assert_eq!(touched.pages(), [(memory, 7), (disk, 7), (memory, 3), (disk, 0)]);
        (0..100_000).for_each(|page| touched.note(memory, page));
        assert_eq!(touched.pages().len(), NOTED_MAX);
    }
}
