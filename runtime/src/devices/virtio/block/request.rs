//! One block request.
//!
//! Long requests go through a bounded buffer piece by piece. A pause between
//! two pieces leaves the request unfinished, and executing it again from the
//! start gives the same result: a read writes the same bytes, and the data of
//! a write lie unchanged in guest memory.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::super::prefault::touch;
use super::super::segments::{Buffers, Segments};
use super::super::transport::{Broken, Ticket, Transport};
use super::SECTOR;
use super::disk::Disk;
use super::erase::{Erase, erase};

pub(super) const HEADER: u64 = 16;
const STATUS: u64 = 1;
/// Bytes that are moved at once.
const PIECE: u64 = 256 << 10;
/// The serial number that GET_ID gives, padded to its 20 bytes.
const SERIAL: &[u8; 20] = b"coppice-disk\0\0\0\0\0\0\0\0";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Erase(Erase),
    Identify,
    Unknown,
}

/// How a request ends: the status byte, and the data bytes that were written
/// before it. `None` if the driver reset the device meanwhile.
pub(super) type Outcome = Option<(u32, u32)>;

/// Executes a request and finishes it. Guest mistakes that leave no place
/// for a status break the device.
pub(super) fn execute(
    transport: &Transport,
    disk: &Disk,
    ticket: Ticket,
    buffers: &Buffers,
) -> Result<(), Broken> {
    let memory = transport.memory();
    let mut header = [0; 16];
    buffers.readable.read(memory, 0, &mut header)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = kind(u32::from_le_bytes([t0, t1, t2, t3]));
    let sector = u64::from_le_bytes(sector);
    let status_at = buffers
        .writable
        .len()
        .checked_sub(STATUS)
        .ok_or(Broken("a block request has no place for its status"))?;

    let outcome = match kind {
        Kind::Read => read(transport, disk, ticket, sector, &buffers.writable, status_at)?,
        Kind::Write => {
            let len = buffers.readable.len() - HEADER;
            write(transport, disk, ticket, sector, &buffers.readable, len)?
        }
        // The overlay lives as long as the machine; earlier writes are in it.
        Kind::Flush => Some((VIRTIO_BLK_S_OK, 0)),
        Kind::Erase(kind) => erase(transport, disk, ticket, kind, &buffers.readable)?,
        Kind::Identify => identify(transport, ticket, &buffers.writable, status_at)?,
        Kind::Unknown => Some((VIRTIO_BLK_S_UNSUPP, 0)),
    };
    let Some((status, data)) = outcome else { return Ok(()) };
    buffers.writable.walk(status_at, 1, |address, len| {
        touch(memory, address.0, len as u64);
        Ok(())
    })?;
    let pass = transport.enter();
    if transport.is_stale(ticket) {
        return Ok(());
    }
    let [status, ..] = status.to_le_bytes();
    buffers.writable.write(memory, status_at, &[status])?;
    transport.finish(&pass, ticket, data + 1);
    Ok(())
}

fn kind(number: u32) -> Kind {
    match number {
        VIRTIO_BLK_T_IN => Kind::Read,
        VIRTIO_BLK_T_OUT => Kind::Write,
        VIRTIO_BLK_T_FLUSH => Kind::Flush,
        VIRTIO_BLK_T_GET_ID => Kind::Identify,
        VIRTIO_BLK_T_DISCARD => Kind::Erase(Erase::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => Kind::Erase(Erase::WriteZeroes),
        _ => Kind::Unknown,
    }
}

fn read(
    transport: &Transport,
    disk: &Disk,
    ticket: Ticket,
    sector: u64,
    to: &Segments,
    len: u64,
) -> Result<Outcome, Broken> {
    let Ok(offset) = disk.range(sector, len) else { return Ok(Some((VIRTIO_BLK_S_IOERR, 0))) };
    if !len.is_multiple_of(SECTOR) {
        return Ok(Some((VIRTIO_BLK_S_IOERR, 0)));
    }
    let mut done = 0;
    while done < len {
        let mut piece = buffer(len - done);
        if let Err(error) = disk.read(offset + done, &mut piece) {
            tracing::warn!("block read: {error}");
            return Ok(Some((VIRTIO_BLK_S_IOERR, count(done))));
        }
        if !put(transport, ticket, to, done, &piece)? {
            return Ok(None);
        }
        done += piece.len() as u64;
    }
    Ok(Some((VIRTIO_BLK_S_OK, count(len))))
}

fn write(
    transport: &Transport,
    disk: &Disk,
    ticket: Ticket,
    sector: u64,
    from: &Segments,
    len: u64,
) -> Result<Outcome, Broken> {
    let failed = Ok(Some((VIRTIO_BLK_S_IOERR, 0)));
    let Ok(offset) = disk.range(sector, len) else { return failed };
    if disk.read_only() || !len.is_multiple_of(SECTOR) {
        return failed;
    }
    let mut done = 0;
    while done < len {
        let mut piece = buffer(len - done);
        from.read(transport.memory(), HEADER + done, &mut piece)?;
        let prepared = disk.prepare(offset + done, &piece);
        let pass = transport.enter();
        if transport.is_stale(ticket) {
            return Ok(None);
        }
        let committed = prepared.and_then(|blocks| disk.commit(&blocks));
        drop(pass);
        if let Err(error) = committed {
            tracing::warn!("block write: {error}");
            return failed;
        }
        done += piece.len() as u64;
    }
    Ok(Some((VIRTIO_BLK_S_OK, 0)))
}

fn identify(
    transport: &Transport,
    ticket: Ticket,
    to: &Segments,
    room: u64,
) -> Result<Outcome, Broken> {
    let len = SERIAL.len().min(usize::try_from(room).unwrap_or(usize::MAX));
    let told = put(transport, ticket, to, 0, &SERIAL[..len])?;
    Ok(told.then_some((VIRTIO_BLK_S_OK, count(len as u64))))
}

/// Writes to guest memory with a pass, unless the request is stale.
fn put(
    transport: &Transport,
    ticket: Ticket,
    to: &Segments,
    offset: u64,
    bytes: &[u8],
) -> Result<bool, Broken> {
    let memory = transport.memory();
    to.walk(offset, bytes.len(), |address, len| {
        touch(memory, address.0, len as u64);
        Ok(())
    })?;
    let _pass = transport.enter();
    if transport.is_stale(ticket) {
        return Ok(false);
    }
    to.write(memory, offset, bytes)?;
    Ok(true)
}

/// A buffer for the next piece.
fn buffer(left: u64) -> Vec<u8> {
    vec![0; usize::try_from(left.min(PIECE)).expect("a piece is small")]
}

/// A request's length; the ring's field is narrower than a hostile request.
fn count(len: u64) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX - 1)
}

#[cfg(test)]
pub(super) mod testing {
    use super::super::{Block, step};
    use super::*;
    use crate::devices::virtio::testing::{BUFFERS, Driver, WRITE};
    use std::fs::File;

    pub(in super::super) const DATA: u64 = BUFFERS + 0x1000;
    pub(in super::super) const STATUS_AT: u64 = BUFFERS + 0x800;
    pub(in super::super) const SECTORS: u64 = 2048;

    pub(in super::super) fn device(read_only: bool) -> (Driver, Disk) {
        use std::io::Write;
        let len = SECTORS * SECTOR;
        let mut pool =
            File::from(rustix::fs::memfd_create("p", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let image: Vec<u8> = (0..len).map(|at| (at / SECTOR).to_le_bytes()[0]).collect();
        pool.write_all(&image).unwrap();
        let overlay = tempfile::tempfile().unwrap();
        overlay.set_len(len).unwrap();
        let disk = Disk::new(len, read_only, &pool, overlay, Vec::new()).unwrap();
        (Driver::new(Block::identity(len, read_only).unwrap()), disk)
    }

    /// Runs one request and returns its status and the used length.
    pub(in super::super) fn run(
        driver: &Driver,
        disk: &Disk,
        kind: u32,
        sector: u64,
        data: &[(u64, u32, u16)],
    ) -> (u8, u32) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        driver.put(BUFFERS, &header);
        driver.put(STATUS_AT, &[0xff]);
        let mut chain = vec![(BUFFERS, 16, 0)];
        chain.extend(data);
        chain.push((STATUS_AT, 1, WRITE));
        driver.offer(0, 0, &chain);
        step(&driver.transport, disk);
        let used = driver.used(0);
        (driver.get(STATUS_AT, 1)[0], used.last().map_or(0, |(_, len)| *len))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Block, step};
    use super::testing::*;
    use super::*;
    use crate::devices::virtio::testing::{BUFFERS, Descriptor, Driver, WRITE};
    use crate::protocol::PageRun;
    use std::fs::File;

    #[test]
    fn reads_writes_and_reads_back() {
        let (driver, disk) = device(false);
        assert_eq!(
            run(&driver, &disk, 0, 5, &[(DATA, 512, WRITE), (DATA + 4096, 512, WRITE)]),
            (0, 1025)
        );
        assert_eq!((driver.get(DATA, 1)[0], driver.get(DATA + 4096, 1)[0]), (5, 6));
        driver.put(DATA, &[0xaa; 1024]);
        assert_eq!(run(&driver, &disk, 1, 6, &[(DATA, 1024, 0)]), (0, 1));
        assert_eq!(disk.overlay_runs(), [PageRun { first: 0, count: 1 }]);
        assert_eq!(run(&driver, &disk, 0, 5, &[(DATA, 2048, WRITE)]), (0, 2049));
        let bytes = driver.get(DATA, 2048);
        assert_eq!((bytes[0], bytes[512], bytes[1535], bytes[1536]), (5, 0xaa, 0xaa, 8));
    }

    #[test]
    fn long_requests_go_through_whole() {
        let (driver, disk) = device(false);
        let len = u32::try_from(SECTORS * SECTOR).unwrap();
        assert_eq!(run(&driver, &disk, 0, 0, &[(DATA, len, WRITE)]), (0, len + 1));
        let bytes = driver.get(DATA, len as usize);
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == (at / 512).to_le_bytes()[0]));
    }

    #[test]
    fn identity_flush_and_unknown_requests() {
        let (driver, disk) = device(false);
        assert_eq!(run(&driver, &disk, 8, 0, &[(DATA, 20, WRITE)]), (0, 21));
        assert_eq!(driver.get(DATA, 20), SERIAL);
        assert_eq!(run(&driver, &disk, 4, 0, &[]), (0, 1));
        assert_eq!(run(&driver, &disk, 77, 0, &[]), (2, 1));
    }

    #[test]
    fn what_lies_outside_the_disk_fails() {
        let (driver, disk) = device(false);
        for (kind, sector, flags) in
            [(0, SECTORS, WRITE), (1, SECTORS, 0), (0, u64::MAX, WRITE), (1, u64::MAX / 512, 0)]
        {
            assert_eq!(run(&driver, &disk, kind, sector, &[(DATA, 512, flags)]).0, 1);
        }
        assert_eq!(run(&driver, &disk, 0, 0, &[(DATA, 100, WRITE)]).0, 1, "no whole sector");
        assert_eq!(run(&driver, &disk, 0, 0, &[(DATA, u32::MAX / 2, WRITE)]).0, 1);
        assert!(!driver.needs_reset());
    }

    #[test]
    fn a_read_only_disk_takes_no_writes() {
        let (driver, disk) = device(true);
        assert_eq!(run(&driver, &disk, 1, 0, &[(DATA, 512, 0)]).0, 1);
        assert_eq!(disk.overlay_runs(), []);
    }

    #[test]
    fn an_overlay_that_cannot_be_written_is_an_error_for_the_guest() {
        use std::io::Write;
        let mut pool =
            File::from(rustix::fs::memfd_create("p", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        pool.write_all(&[0; 8192]).unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let disk = Disk::new(8192, false, &pool, full, Vec::new()).unwrap();
        let driver = Driver::new(Block::identity(8192, false).unwrap());
        assert_eq!(run(&driver, &disk, 1, 0, &[(DATA, 512, 0)]).0, 1);
        assert_eq!(disk.overlay_runs(), [], "what was not written is not there");
    }

    #[test]
    fn hostile_requests_stop_the_device() {
        let hostile: [&[Descriptor]; 4] = [
            // No status, no header, a header outside memory, data outside it.
            &[(BUFFERS, 16, 0, 0)],
            &[(BUFFERS, 4, 1, 1), (STATUS_AT, 1, WRITE, 0)],
            &[(u64::MAX - 4, 16, 1, 1), (STATUS_AT, 1, WRITE, 0)],
            &[(BUFFERS, 16, 1, 1), (0xf000_0000, 512, WRITE | 1, 2), (STATUS_AT, 1, WRITE, 0)],
        ];
        for chain in hostile {
            let (driver, disk) = device(false);
            driver.put(BUFFERS, &[0; 16]);
            for (index, descriptor) in (0..).zip(chain) {
                driver.describe(0, index, *descriptor);
            }
            driver.make_available(0, 0);
            step(&driver.transport, &disk);
            assert!(driver.needs_reset(), "{chain:?}");
            assert_eq!(driver.used(0), []);
        }
    }
}
