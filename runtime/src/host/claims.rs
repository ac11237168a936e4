//! What a machine's process says of itself, held against what its machine is.
//!
//! A process that its guest has taken over says what it likes. Invariant: what
//! passes here indexes nothing outside of the machine's own memory and disks, so
//! that neither the supervisor nor the page server has to be on its guard.

use crate::pieces::PIECES_MAX;
use crate::protocol::{Content, MachineConfig, PAGE_SIZE, PageRun, Region};

/// Where user space ends on x86-64.
const ADDRESS_MAX: u64 = 1 << 47;

/// The sizes of a machine.
#[derive(Debug)]
pub(super) struct Claims {
    memory_pages: u64,
    disk_blocks: Vec<u64>,
}

impl Claims {
    /// Those of this machine.
    pub(super) fn of(config: &MachineConfig) -> Self {
        let disk_blocks = config.disks.iter().map(|disk| disk.len.div_ceil(PAGE_SIZE)).collect();
        Self { memory_pages: config.memory_bytes / PAGE_SIZE, disk_blocks }
    }

    /// Pages of its memory.
    pub(super) fn check_freed(&self, freed: &[PageRun]) -> Result<(), &'static str> {
        ascending(freed, self.memory_pages).ok_or("freed pages that are not its memory's")
    }

    /// Blocks of each of its disks.
    pub(super) fn check_overlays(&self, overlays: &[Vec<PageRun>]) -> Result<(), &'static str> {
        if overlays.len() != self.disk_blocks.len() {
            return Err("overlays of another number of disks");
        }
        let mut disks = overlays.iter().zip(&self.disk_blocks);
        let within = disks.all(|(runs, blocks)| ascending(runs, *blocks).is_some());
        within.then_some(()).ok_or("blocks that are not its disk's")
    }

    /// All of its memory in one range, its disks, and nothing twice.
    pub(super) fn check_regions(&self, regions: &[Region]) -> Result<(), &'static str> {
        if regions.len() > PIECES_MAX + self.disk_blocks.len() {
            return Err("more mappings than a machine has");
        }
        if !regions.iter().all(|region| self.is_own(region)) {
            return Err("a mapping of what it does not have");
        }
        let mut all: Vec<&Region> = regions.iter().collect();
        all.sort_unstable_by_key(|region| region.address);
        if !all.windows(2).all(|pair| pair[0].address + pair[0].len <= pair[1].address) {
            return Err("mappings that overlap");
        }
        all.retain(|region| region.content == Content::Memory);
        let start = all.first().map_or(0, |region| region.address);
        let in_order = all.iter().all(|region| region.address - start == region.offset);
        let len: u64 = all.iter().map(|region| region.len).sum();
        let whole = in_order && len == self.memory_pages * PAGE_SIZE;
        whole.then_some(()).ok_or("memory that is not one range")
    }

    fn is_own(&self, region: &Region) -> bool {
        let pages = match region.content {
            Content::Memory => Some(&self.memory_pages),
            Content::Disk(index) => {
                usize::try_from(index).ok().and_then(|index| self.disk_blocks.get(index))
            }
        };
        let Region { address, len, offset, .. } = *region;
        let whole = [address, len, offset].iter().all(|n| n.is_multiple_of(PAGE_SIZE));
        let ends = |at: u64, limit: u64| at.checked_add(len).is_some_and(|end| end <= limit);
        let in_image = pages.is_some_and(|pages| ends(offset, pages.saturating_mul(PAGE_SIZE)));
        whole && len > 0 && in_image && ends(address, ADDRESS_MAX)
    }
}

/// Whether the runs ascend, are not empty, and lie in `pages` pages.
fn ascending(runs: &[PageRun], pages: u64) -> Option<()> {
    let mut behind = 0;
    for run in runs {
        let end = run.first.checked_add(run.count).filter(|end| *end <= pages)?;
        if run.count == 0 || run.first < behind {
            return None;
        }
        behind = end;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::DiskConfig;

    fn claims() -> Claims {
        let disks = vec![DiskConfig { len: 10 * PAGE_SIZE - 512, read_only: false }];
        Claims::of(&MachineConfig { memory_bytes: 100 * PAGE_SIZE, vcpus: 1, disks })
    }

    const fn run(first: u64, count: u64) -> PageRun {
        PageRun { first, count }
    }

    fn region(content: Content, address: u64, offset: u64, pages: u64) -> Region {
        let [address, offset, len] = [address, offset, pages].map(|n| n.wrapping_mul(PAGE_SIZE));
        Region { content, address, len, offset, pooled: true }
    }

    #[test]
    fn only_its_own_pages_are_believed() {
        let claims = claims();
        claims.check_freed(&[]).unwrap();
        claims.check_freed(&[run(0, 2), run(2, 1), run(99, 1)]).unwrap();
        for bad in [
            vec![run(u64::MAX, 1)],
            vec![run(1, u64::MAX)],
            vec![run(99, 2)],
            vec![run(3, 0)],
            vec![run(3, 2), run(4, 1)],
            vec![run(3, 2), run(1, 1)],
        ] {
            claims.check_freed(&bad).unwrap_err();
        }
    }

    #[test]
    fn only_its_own_blocks_are_believed() {
        let claims = claims();
        claims.check_overlays(&[vec![run(0, 10)]]).unwrap();
        for bad in [vec![], vec![vec![], vec![]], vec![vec![run(9, 2)]], vec![vec![run(0, 0)]]] {
            claims.check_overlays(&bad).unwrap_err();
        }
    }

    #[test]
    fn only_its_own_mappings_are_believed() {
        use Content::{Disk, Memory};
        let claims = claims();
        let disk = region(Disk(0), 1000, 0, 10);
        let (low, high) = (region(Memory, 500, 0, 40), region(Memory, 540, 40, 60));
        claims.check_regions(&[high, disk, low]).unwrap();
        claims.check_regions(&[region(Memory, 500, 0, 100)]).unwrap();
        for bad in [
            vec![],
            vec![low],
            vec![low, low, high],
            vec![low, region(Memory, 541, 40, 60)],
            vec![low, region(Memory, 540, 40, 61)],
            vec![low, high, region(Disk(1), 1000, 0, 1)],
            vec![low, high, region(Disk(0), 1000, 1, 10)],
            vec![low, high, region(Disk(0), 590, 0, 10)],
            vec![low, high, region(Disk(0), 1000, 0, 0)],
            vec![region(Memory, u64::MAX / PAGE_SIZE, 0, 100)],
            vec![Region { address: 501, ..region(Memory, 500, 0, 100) }],
            vec![Region { len: u64::MAX, ..low }, high],
        ] {
            claims.check_regions(&bad).unwrap_err();
        }
        let many = vec![region(Memory, 500, 0, 1); PIECES_MAX + 2];
        assert_eq!(claims.check_regions(&many), Err("more mappings than a machine has"));
    }
}
