//! One block request.
//!
//! Long requests go through a bounded buffer piece by piece. A pause between
//! two pieces leaves the request unfinished, and executing it again from the
//! start gives the same result: a read writes the same bytes, and the data of
//! a write lie unchanged in guest memory.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::super::prefault::touch;
use super::super::segments::{Buffers, Segments};
use super::super::transport::{Broken, Ticket, Transport};
use super::SECTOR;
use super::disk::Disk;

const HEADER: u64 = 16;
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
    Identify,
    Unknown,
}

/// How a request ends: the status byte, and the data bytes that were written
/// before it. `None` if the driver reset the device meanwhile.
type Outcome = Option<(u32, u32)>;

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
