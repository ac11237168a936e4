//! Borrowing the descriptor of an eventfd, to wait for it.
#![expect(unsafe_code, reason = "EventFd only offers its raw descriptor")]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor, for as long as its owner is borrowed.
pub(crate) fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open while `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
