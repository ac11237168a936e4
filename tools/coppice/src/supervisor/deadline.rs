//! Work that asks somebody who may never answer.

use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

/// Does something, and if it is not done in time also `late`, which must let
/// it end.
pub(super) fn in_time<T>(
    limit: Duration,
    late: impl FnOnce() + Send,
    work: impl FnOnce() -> T,
) -> T {
    let (working, is_done) = bounded::<()>(0);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if is_done.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                late();
            }
        });
        let done = work();
        drop(working);
        done
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_what_takes_too_long_is_ended() {
        let done = in_time(Duration::from_secs(1000), || unreachable!("it is done"), || 7);
        assert_eq!(done, 7);
        let (mine, mut other) = UnixStream::pair().unwrap();
        let end = || drop(mine.shutdown(std::net::Shutdown::Both));
        let read = in_time(Duration::from_millis(10), end, || other.read(&mut [0]));
        assert_eq!(read.unwrap(), 0);
    }
}
