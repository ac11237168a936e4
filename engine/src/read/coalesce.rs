//! Which frames are read together: neighbours in a pack with little between
//! them become one request.

use std::ops::Range;

/// Bytes that are read for nothing rather than with a request of their own.
const GAP_LEN_MAX: u64 = 16 << 10;
/// No request is longer than this because of coalescing.
const REQUEST_LEN_MAX: u64 = 512 << 10;

/// A part of a file to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Which of the parts that were asked for it covers.
    pub(super) parts: Range<usize>,
}

/// The requests for parts of one file, given by offset and length and
/// ascending by offset.
pub(super) fn coalesce(parts: &[(u64, u32)]) -> Vec<Request> {
    let mut requests: Vec<Request> = Vec::new();
    for (number, (offset, len)) in parts.iter().enumerate() {
        let end = offset + u64::from(*len);
        match requests.last_mut() {
            Some(last)
                if *offset <= last.offset + last.len + GAP_LEN_MAX
                    && end.max(last.offset + last.len) - last.offset <= REQUEST_LEN_MAX =>
            {
                last.len = last.len.max(end - last.offset);
                last.parts.end = number + 1;
            }
            _ => requests.push(Request {
                offset: *offset,
                len: u64::from(*len),
                parts: number..number + 1,
            }),
        }
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_read_together() {
        let far = 1 << 30;
        let parts = [(16, 100), (116, 100), (216 + GAP_LEN_MAX, 50), (far, 7)];
        let requests = coalesce(&parts);
        let near = Request { offset: 16, len: 250 + GAP_LEN_MAX, parts: 0..3 };
        assert_eq!(requests, [near, Request { offset: far, len: 7, parts: 3..4 }]);
        assert_eq!(coalesce(&[]), []);
    }

    #[test]
    fn requests_stay_short() {
        let parts: Vec<(u64, u32)> = (0..100).map(|at| (at * 60_000, 60_000)).collect();
        let requests = coalesce(&parts);
        assert!(requests.iter().all(|request| request.len <= REQUEST_LEN_MAX));
        let covered: Vec<usize> = requests.iter().flat_map(|it| it.parts.clone()).collect();
        assert_eq!(covered, (0..100).collect::<Vec<_>>());
        assert_eq!(coalesce(&[(0, 1 << 20)]).len(), 1);
    }
}
