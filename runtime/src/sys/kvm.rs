//! Names for failed KVM calls.

/// A KVM call that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub(crate) struct KvmError {
    /// The call, as the kernel's documentation names it.
    pub(crate) call: &'static str,
    /// The kernel's answer.
    pub(crate) source: std::io::Error,
}

/// Names the call whose error is being passed on.
pub(crate) fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError { call, source: error.into() }
}
