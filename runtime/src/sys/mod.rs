//! Raw kernel interfaces, each wrapped once: everything above this layer is
//! written against safe functions and owned descriptors.

pub mod channel;
pub(crate) mod event;
pub mod heap;
pub mod kick;
pub(crate) mod kvm;
pub(crate) mod mapping;
pub(crate) mod memfd;
pub mod pagemap;
pub(crate) mod process;
pub mod remote_memory;
pub(crate) mod side;
pub mod tap;
pub mod userfault;
