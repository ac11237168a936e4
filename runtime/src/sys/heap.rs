//! The C library's heap.
#![expect(unsafe_code, reason = "the heap is set up by a call of the C library")]

/// Lets all threads allocate from the same few heaps.
///
/// By itself the C library gives each of them one of its own, up to eight for
/// each processor, and what one thread frees there no other can use. A process
/// whose threads hand large buffers to each other would keep many times what
/// it needs. To be called before there are threads; without the GNU C library
/// it does nothing.
pub fn share_arenas() {
    #[cfg(target_env = "gnu")]
    {
        const ARENAS_MAX: libc::c_int = 2;
        // SAFETY: the call sets a number in the allocator, under its own lock.
        let accepted = unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX) };
        if accepted == 0 {
            tracing::debug!("the number of heaps cannot be limited");
        }
    }
}
