//! When a page server that ends again and again is given up.

use std::collections::VecDeque;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// How many ends are put up with. An end counts if it was the page server's own
/// doing, or if it came before the process was of any use: somebody who kills
/// it now and then does no harm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// So many ends that count ...
    pub ends: usize,
    /// ... within this time are too many.
    pub within: Duration,
    /// A process that was killed after it served for this long was of use.
    pub of_use_after: Duration,
    /// A request that was not answered before so many ended is refused: it may
    /// be what ends them.
    pub ends_of_a_request: usize,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            ends: 5,
            within: Duration::from_secs(10),
            of_use_after: Duration::from_millis(100),
            ends_of_a_request: 2,
        }
    }
}

/// The ends that count.
#[derive(Debug)]
pub(super) struct Ends {
    patience: Patience,
    counted: VecDeque<Instant>,
}

impl Ends {
    pub(super) fn new(patience: Patience) -> Self {
        Self { patience, counted: VecDeque::new() }
    }

    /// Whether this end at `now` is one too many. `served` is how long it has
    /// served, if it ever began.
    pub(super) fn is_too_many(
        &mut self,
        now: Instant,
        status: Option<ExitStatus>,
        served: Option<Duration>,
    ) -> bool {
        let killed = status.and_then(|status| status.signal()) == Some(libc::SIGKILL);
        let of_use = served.is_some_and(|served| served >= self.patience.of_use_after);
        if killed && of_use {
            return false;
        }
        self.counted.push_back(now);
        self.counted.retain(|end| now.duration_since(*end) < self.patience.within);
        self.counted.len() >= self.patience.ends
    }
}

/// How a process ended, for a log.
pub(super) fn manner(status: Option<ExitStatus>) -> String {
    match status {
        None => "could not be started".to_owned(),
        Some(status) => match (status.signal(), status.code()) {
            (Some(signal), _) => format!("was ended by signal {signal}"),
            (None, Some(code)) => format!("ended with code {code}"),
            (None, None) => "ended".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KILLED: i32 = libc::SIGKILL;
    const CRASHED: i32 = libc::SIGSEGV;

    fn end(
        ends: &mut Ends,
        at_ms: u64,
        signal: i32,
        served_ms: Option<u64>,
        zero: Instant,
    ) -> bool {
        let status = Some(ExitStatus::from_raw(signal));
        let served = served_ms.map(Duration::from_millis);
        ends.is_too_many(zero + Duration::from_millis(at_ms), status, served)
    }

    #[test]
    fn one_that_is_killed_while_it_is_of_use_is_never_given_up() {
        let (zero, mut ends) = (Instant::now(), Ends::new(Patience::default()));
        assert!((0..1000).all(|n| !end(&mut ends, n, KILLED, Some(100), zero)));
    }

    #[test]
    fn five_useless_ends_in_ten_seconds_are_too_many() {
        let zero = Instant::now();
        for (signal, served) in [(KILLED, None), (KILLED, Some(99)), (CRASHED, Some(1900))] {
            let mut ends = Ends::new(Patience::default());
            assert!((0..4).all(|n| !end(&mut ends, n * 2000, signal, served, zero)));
            assert!(end(&mut ends, 8000, signal, served, zero));
            let mut ends = Ends::new(Patience::default());
            assert!((0..100).all(|n| !end(&mut ends, n * 2500, signal, served, zero)));
        }
    }
}
