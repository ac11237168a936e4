//! What the engine takes from its surroundings: the time.

use std::time::{SystemTime, UNIX_EPOCH};

/// Where the store reads the time from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Clock {
    /// The host's clock.
    #[default]
    System,
    /// Always this instant, in milliseconds since 1970.
    Fixed(u64),
}

impl Clock {
    /// Milliseconds since 1970; zero on a host whose clock lies before that.
    #[must_use]
    pub fn now_unix_ms(self) -> u64 {
        match self {
            Self::Fixed(ms) => ms,
            Self::System => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .ok()
                .and_then(|since| u64::try_from(since.as_millis()).ok())
                .unwrap_or(0),
        }
    }
}

/// Locks a mutex whose data stays valid even if a holder panicked, because
/// every change under these locks is a single assignment or insertion.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
