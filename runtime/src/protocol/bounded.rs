//! Lists from a process that its guest may have taken over, bounded while they
//! are read.
//!
//! Invariant: a list takes no more than a small multiple of the bytes that it
//! came in. Runs ascend, do not overlap and are never empty, so an element that
//! is nothing, of which a byte makes many, is refused at once.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, SeqAccess, Visitor};

use crate::pieces::PIECES_MAX;
use crate::protocol::{PageRun, Region};

/// Disks that a machine may have; the window for devices has fewer places.
const DISKS_MAX: usize = 64;

/// Mappings of a machine's process.
pub(super) fn regions<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Region>, D::Error> {
    let limit = PIECES_MAX + DISKS_MAX;
    from.deserialize_seq(Few { limit, each: PhantomData::<Region>, what: "mappings" })
}

/// Ascending runs of pages for each of a few disks.
pub(super) fn lists_of_runs<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Vec<Vec<PageRun>>, D::Error> {
    from.deserialize_seq(Few { limit: DISKS_MAX, each: Runs, what: "disks" })
}

/// Ascending runs of pages.
pub(super) fn runs<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PageRun>, D::Error> {
    Runs.deserialize(from)
}

/// A list of no more than a few.
struct Few<S> {
    limit: usize,
    each: S,
    what: &'static str,
}

impl<'de, S: DeserializeSeed<'de> + Clone> Visitor<'de> for Few<S> {
    type Value = Vec<S::Value>;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "at most {} {}", self.limit, self.what)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut all = Vec::new();
        while let Some(one) = list.next_element_seed(self.each.clone())? {
            if all.len() == self.limit {
                return Err(A::Error::custom("too many"));
            }
            all.push(one);
        }
        Ok(all)
    }
}

#[derive(Debug, Clone, Copy)]
struct Runs;

impl<'de> DeserializeSeed<'de> for Runs {
    type Value = Vec<PageRun>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Runs {
    type Value = Vec<PageRun>;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("runs of pages that ascend")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut runs = Vec::new();
        let mut behind = 0;
        while let Some(run) = list.next_element::<PageRun>()? {
            let end = run.first.checked_add(run.count);
            match end.filter(|_| run.count > 0 && run.first >= behind) {
                Some(end) => behind = end,
                None => return Err(A::Error::custom("runs of pages that do not ascend")),
            }
            runs.push(run);
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use crate::protocol::{Content, PageRun, Region, VmmReply};

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first, count }
    }

    fn crosses(reply: &VmmReply) -> bool {
        let bytes = postcard::to_stdvec(reply).unwrap();
        postcard::from_bytes::<VmmReply>(&bytes).is_ok_and(|same| same == *reply)
    }

    fn saved(overlays: Vec<Vec<PageRun>>, freed: Vec<PageRun>) -> VmmReply {
        VmmReply::Saved { state: vec![1], overlays, freed }
    }

    #[test]
    fn runs_must_ascend() {
        assert!(crosses(&saved(vec![vec![], vec![run(0, 1)]], vec![run(3, 4), run(7, 1)])));
        for bad in [
            vec![run(u64::MAX, 1)],
            vec![run(1, u64::MAX)],
            vec![run(5, 0)],
            vec![run(5, 2), run(6, 1)],
            vec![run(5, 2), run(1, 1)],
        ] {
            assert!(!crosses(&saved(Vec::new(), bad.clone())), "{bad:?}");
            assert!(!crosses(&saved(vec![Vec::new(), bad.clone()], Vec::new())), "{bad:?}");
        }
    }

    #[test]
    fn lists_are_few() {
        assert!(crosses(&saved(vec![Vec::new(); super::DISKS_MAX], Vec::new())));
        assert!(!crosses(&saved(vec![Vec::new(); super::DISKS_MAX + 1], Vec::new())));
        let content = Content::Memory;
        let region = Region { content, address: 0, len: 4096, offset: 0, pooled: true };
        for (count, fits) in [(512 + super::DISKS_MAX, true), (513 + super::DISKS_MAX, false)] {
            assert_eq!(crosses(&VmmReply::Built { regions: vec![region; count] }), fits);
        }
    }
}
