//! Requests that make ranges of the disk zeros: discard and write zeroes.
//!
//! Both leave zeros behind, so that what a guest gave back reads the same in
//! every fork, and costs neither space in the overlay nor bytes in a snapshot.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

use super::super::segments::Segments;
use super::super::transport::{Broken, Ticket, Transport};
use super::disk::Disk;
use super::request::{HEADER, Outcome};

/// Ranges in one request.
pub(super) const RANGES_MAX: u32 = 64;
/// Sectors in one range: 2 GiB.
pub(super) const SECTORS_MAX: u32 = 1 << 22;
/// Sector u64, number of sectors u32, flags u32.
const RANGE_LEN: u64 = 16;
/// Of write zeroes: whether the space may be given back, which it always is.
const UNMAP: u32 = 1;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Erase {
    Discard,
    WriteZeroes,
}

/// A part of the disk.
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// Executes a request whose ranges follow its header. `None` if the driver
/// reset the device meanwhile.
pub(super) fn erase(
    transport: &Transport,
    disk: &Disk,
    ticket: Ticket,
    kind: Erase,
    from: &Segments,
) -> Result<Outcome, Broken> {
    let ranges = match ranges(transport, from)? {
        Some(ranges) if !disk.read_only() => ranges,
        _ => return Ok(Some((VIRTIO_BLK_S_IOERR, 0))),
    };
    let known = if kind == Erase::WriteZeroes { UNMAP } else { 0 };
    if ranges.iter().any(|range| range.flags & !known != 0) {
        return Ok(Some((VIRTIO_BLK_S_UNSUPP, 0)));
    }
    for range in ranges {
        let len = u64::from(range.sectors) * super::SECTOR;
        let Ok(offset) = disk.range(range.sector, len) else {
            return Ok(Some((VIRTIO_BLK_S_IOERR, 0)));
        };
        if range.sectors > SECTORS_MAX {
            return Ok(Some((VIRTIO_BLK_S_IOERR, 0)));
        }
        let prepared = disk.prepare_erase(offset, len);
        let pass = transport.enter();
        if transport.is_stale(ticket) {
            return Ok(None);
        }
        let erased = prepared.and_then(|erasure| disk.erase(&erasure));
        drop(pass);
        if let Err(error) = erased {
            tracing::warn!("block erase: {error}");
            return Ok(Some((VIRTIO_BLK_S_IOERR, 0)));
        }
    }
    Ok(Some((VIRTIO_BLK_S_OK, 0)))
}

/// The ranges of a request; `None` if their number is wrong.
fn ranges(transport: &Transport, from: &Segments) -> Result<Option<Vec<Range>>, Broken> {
    let len = from.len().saturating_sub(HEADER);
    if len == 0 || !len.is_multiple_of(RANGE_LEN) || len / RANGE_LEN > u64::from(RANGES_MAX) {
        return Ok(None);
    }
    let mut ranges = Vec::new();
    for index in 0..len / RANGE_LEN {
        let mut bytes = [0; 16];
        from.read(transport.memory(), HEADER + index * RANGE_LEN, &mut bytes)?;
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        ranges.push(Range {
            sector: u64::from_le_bytes(sector),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        });
    }
    Ok(Some(ranges))
}

#[cfg(test)]
mod tests {
    use super::super::request::testing::{DATA, SECTORS, device, run};
    use super::*;
    use crate::protocol::PageRun;

    const DISCARD: u32 = 11;
    const WRITE_ZEROES: u32 = 13;

    fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    }

    /// Runs one request with these ranges and returns its status.
    fn erased(
        driver: &crate::devices::virtio::testing::Driver,
        disk: &Disk,
        kind: u32,
        ranges: &[Vec<u8>],
    ) -> u8 {
        let bytes = ranges.concat();
        driver.put(DATA, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        run(driver, disk, kind, 0, &[(DATA, len, 0)]).0
    }

    #[test]
    fn ranges_become_zeros_and_their_edges_stay() {
        for kind in [DISCARD, WRITE_ZEROES] {
            let (driver, disk) = device(false);
            // Sectors 3 to 20, and 40 to 47: parts of blocks, and whole ones.
            assert_eq!(erased(&driver, &disk, kind, &[range(3, 18, 0), range(40, 8, 0)]), 0);
            let mut bytes = vec![0xff; 48 * 512];
            disk.read(0, &mut bytes).unwrap();
            for (sector, bytes) in (0_u8..).zip(bytes.chunks(512)) {
                let gone = (3..21).contains(&sector) || (40..48).contains(&sector);
                let expected = if gone { 0 } else { sector };
                assert!(bytes.iter().all(|byte| *byte == expected), "sector {sector}");
            }
            let runs = [PageRun { first: 0, count: 3 }, PageRun { first: 5, count: 1 }];
            assert_eq!(disk.overlay_runs(), runs);
        }
    }

    #[test]
    fn what_was_written_gives_its_space_back() {
        let (driver, disk) = device(false);
        driver.put(DATA, &[0xaa; 64 << 10]);
        assert_eq!(run(&driver, &disk, 1, 64, &[(DATA, 64 << 10, 0)]).0, 0);
        let before = disk.overlay_allocated();
        assert_eq!(erased(&driver, &disk, DISCARD, &[range(64, 128, 0)]), 0);
        assert!(disk.overlay_allocated() + (64 << 10) <= before);
    }

    #[test]
    fn wrong_ranges_change_nothing() {
        let (driver, disk) = device(false);
        let too_many = vec![range(0, 1, 0); 65];
        for (kind, ranges, status) in [
            (DISCARD, vec![range(SECTORS, 1, 0)], 1),
            (DISCARD, vec![range(u64::MAX, 8, 0)], 1),
            (DISCARD, vec![range(0, u32::MAX, 0)], 1),
            (DISCARD, vec![], 1),
            (DISCARD, too_many, 1),
            (DISCARD, vec![vec![0; 15]], 1),
            (DISCARD, vec![range(0, 8, 1)], 2),
            (WRITE_ZEROES, vec![range(0, 8, 2)], 2),
        ] {
            assert_eq!(erased(&driver, &disk, kind, &ranges), status);
        }
        assert_eq!(erased(&driver, &disk, WRITE_ZEROES, &[range(0, 0, 1)]), 0);
        assert_eq!(disk.overlay_runs(), []);
        let (driver, disk) = device(true);
        assert_eq!(erased(&driver, &disk, DISCARD, &[range(0, 8, 0)]), 1);
    }
}
