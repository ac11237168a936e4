//! Measures the mechanisms of which forking is made, each beside the bare
//! kernel primitive in the same run.
//!
//! The guest is a handful of instructions that run in ring 3 from the first
//! one on, so no figure depends on how fast the host runs a guest kernel.

pub mod accounting;
pub mod bare;
pub mod bulk;
pub mod child;
pub mod cold;
pub mod crowd;
pub mod density;
pub mod dirty;
pub mod effort;
pub mod family;
pub mod faults;
pub mod figures;
pub mod forks;
pub mod frame_study;
pub mod guest;
pub mod kernel;
pub mod library;
pub mod live;
pub mod machine;
pub mod mapping;
pub mod orders;
pub mod packs;
pub mod pools;
pub mod primitives;
pub mod product;
pub mod restores;
pub mod role;
pub mod runner;
pub mod splitter_study;
