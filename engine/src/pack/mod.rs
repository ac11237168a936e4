//! Packs: immutable files of frames that describe themselves.
//!
//! ```text
//! header 16 | frame | frame | … | frame table | key table | footer 96
//! ```
//!
//! Nothing in a pack before the footer depends on the pack's id, so the same
//! input into an empty store gives the same bytes. A pack whose tables are
//! damaged or cut off can still be read by walking its frames.

pub(crate) mod directory;
pub(crate) mod fields;
pub(crate) mod frame;
pub(crate) mod object;
pub(crate) mod pieces;
pub(crate) mod scan;
pub(crate) mod write;

pub(crate) use directory::{Directory, EntryNo, FrameSpan};
pub(crate) use frame::{Frame, FrameKind};
pub(crate) use object::ObjectKind;
pub(crate) use write::{DurablePack, PackWriter};
