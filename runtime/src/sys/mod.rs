//! Raw kernel interfaces, each wrapped once: everything above this layer is
//! written against safe functions and owned descriptors.

pub mod channel;
pub(crate) mod memfd;
pub mod pagemap;
pub mod remote_memory;
pub(crate) mod side;
pub mod userfault;
