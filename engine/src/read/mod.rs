//! Reading: where the pages of an image lie, and their verified bytes.
//!
//! Invariant: no byte leaves this module unless the BLAKE3 of its chunk was
//! computed from it and matches the id in the tree.

mod ahead;
mod coalesce;
mod export;
mod image;
mod map;
mod map_build;
mod map_bytes;
mod page_reader;
mod pipeline;
mod stream;
mod window;

pub use ahead::ReadAhead;
pub(crate) use export::{export, pour};
pub use image::ImageReader;
pub use map::{Extent, FrameRef, Location, PageMap};
pub(crate) use map_build::{Ask, build as build_map};
pub(crate) use page_reader::verified;
pub use page_reader::{Fetched, PageReader};
pub(crate) use window::read_frame;
