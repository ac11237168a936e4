//! placeholder
use std::sync::Arc;
use super::{Identity, Transport, WorkerError};
pub(crate) struct Vsock;
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct VsockState;
impl Vsock {
    pub(crate) fn identity() -> Identity { Identity { device: 19, features: 0, queues: &[128, 128, 16], config: 3u64.to_le_bytes().to_vec() } }
    pub(crate) fn start(_t: Arc<Transport>, _s: Option<&VsockState>) -> Result<Self, WorkerError> { Ok(Self) }
    pub(crate) fn connect(&self, _s: std::os::unix::net::UnixStream, _p: u32) -> std::io::Result<()> { Ok(()) }
    pub(crate) fn save(&self) -> VsockState { VsockState }
}
