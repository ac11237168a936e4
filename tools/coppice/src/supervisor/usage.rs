//! What a machine costs, by the kernel's own accounting.

use anyhow::{Context, Result};
use coppice_runtime::protocol::Content;

use super::machine::{Live, lock};
use super::overlays::Stack;

/// Bytes of one machine.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// Guest pages that only this machine has.
    pub(crate) private_bytes: u64,
    /// Guest pages that it shares with its pool.
    pub(crate) shared_bytes: u64,
    /// The process, each shared page divided by its users.
    pub(crate) pss_bytes: u64,
    /// Its page tables.
    pub(crate) page_table_bytes: u64,
    /// What the process has besides guest memory, pages that it still shares
    /// with the process it was forked from divided by their users.
    pub(crate) vmm_bytes: u64,
    /// What its overlays take on disk.
    pub(crate) overlay_bytes: u64,
}

/// Measures a machine whose process is there.
pub(crate) fn measure(live: &Live) -> Result<Usage> {
    let mut usage = Usage::default();
    for region in live.built.regions.iter().filter(|r| r.content == Content::Memory) {
        let range = region.address..region.address + region.len;
        let counts = live.built.pagemap.count(range)?;
        usage.private_bytes += counts.private * 4096;
        usage.shared_bytes += counts.shared * 4096;
    }
    let pid = live.vmm.pid();
    let rollup = format!("/proc/{pid}/smaps_rollup");
    usage.pss_bytes = proc_kib(&rollup, "Pss:")? * 1024;
    // A guest's own pages are anonymous too, and nobody else has them.
    let anonymous = proc_kib(&rollup, "Pss_Anon:")? * 1024;
    usage.vmm_bytes = anonymous.saturating_sub(usage.private_bytes);
    usage.page_table_bytes = proc_kib(&format!("/proc/{pid}/status"), "VmPTE:")? * 1024;
    for overlay in lock(&live.disks).iter().flat_map(Stack::files) {
        let blocks = rustix::fs::fstat(overlay)?.st_blocks;
        usage.overlay_bytes += u64::try_from(blocks)? * 512;
    }
    Ok(usage)
}

/// Reads a line like `Pss:    1234 kB`.
fn proc_kib(path: &str, field: &str) -> Result<u64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("{path} has no {field}"))
}
