//! Trees: the canonical merkle map from pages to chunks.
//!
//! A leaf has level 0 and covers 128 pages; a node of level `n` covers 128
//! nodes of level `n - 1`. Zero pages and nodes without children are absent,
//! so the id of a node depends only on the bytes it covers. The root adds the
//! length and the splitter.
//!
//! Byte streams have trees of another form, in `stream`.

pub(crate) mod build;
mod diff;
pub(crate) mod image;
pub(crate) mod node;
pub(crate) mod patch;
pub(crate) mod stream;
pub(crate) mod walk;

pub(crate) use build::{NodeSink, NodeSource, TreeBuilder};
pub use diff::ImageDiff;
pub(crate) use diff::diff;
pub(crate) use image::RootRecord;
pub use image::{ImageRef, Splitter};
pub(crate) use node::Node;
pub(crate) use walk::data_bytes;

/// Children of a node.
pub(crate) const FANOUT: usize = 128;

/// Pages covered by a node of this level.
pub(crate) const fn span_of(level: u8) -> u64 {
    1 << (7 * (level as u32 + 1))
}

/// Highest level of any image.
pub(crate) const LEVEL_MAX: u8 = 4;

/// Level of the top node of an image of so many pages.
pub(crate) fn top_level(pages: u64) -> u8 {
    (0..LEVEL_MAX).find(|level| span_of(*level) >= pages).unwrap_or(LEVEL_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_grow_with_length() {
        assert_eq!(top_level(0), 0);
        assert_eq!(top_level(128), 0);
        assert_eq!(top_level(129), 1);
        assert_eq!(top_level(128 * 128), 1);
        assert_eq!(top_level(128 * 128 + 1), 2);
        assert_eq!(top_level(1 << 32), 4);
        assert!(span_of(LEVEL_MAX) >= 1 << 32);
    }
}
