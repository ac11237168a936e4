//! Frames: how messages travel over a byte stream.
//!
//! ```text
//! ┌───────────────┬──────────────────┬───────────────┐
//! │ body_len u32  │ message          │ payload       │
//! │ little-endian │ postcard         │ rest of body  │
//! └───────────────┴──────────────────┴───────────────┘
//! ```
//!
//! A body longer than [`MAX_FRAME`] is refused before anything is allocated.

use std::io::{ErrorKind, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::protocol::MAX_FRAME;

const HEADER: usize = 4;

/// Why a frame could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The peer closed the stream between two frames.
    #[error("the other side closed the connection")]
    Closed,
    /// The stream failed, or ended inside a frame.
    #[error("connection: {0}")]
    Io(#[from] std::io::Error),
    /// A frame is over the limit.
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLarge(usize),
    /// The body is not a message of the expected type.
    #[error("malformed message")]
    Malformed(#[source] postcard::Error),
}

/// Appends one frame to `out`.
pub fn encode<M: Serialize>(
    message: &M,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER]);
    match encode_body(message, payload, out) {
        Ok(length) => {
            out[start..start + HEADER].copy_from_slice(&length.to_le_bytes());
            Ok(())
        }
        Err(error) => {
            out.truncate(start);
            Err(error)
        }
    }
}

/// Appends a frame's body; its length.
fn encode_body<M: Serialize>(
    message: &M,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<u32, FrameError> {
    let start = out.len();
    postcard::to_extend(message, Appender(out)).map_err(FrameError::Malformed)?;
    out.extend_from_slice(payload);
    let length = out.len() - start;
    match u32::try_from(length) {
        Ok(short) if length <= MAX_FRAME => Ok(short),
        _ => Err(FrameError::TooLarge(length)),
    }
}

/// Lets postcard append to a borrowed vector.
struct Appender<'a>(&'a mut Vec<u8>);

impl Extend<u8> for Appender<'_> {
    fn extend<I: IntoIterator<Item = u8>>(&mut self, bytes: I) {
        self.0.extend(bytes);
    }
}

/// Splits a frame's body into its message and its payload.
pub fn decode<M: DeserializeOwned>(body: &[u8]) -> Result<(M, &[u8]), FrameError> {
    postcard::take_from_bytes(body).map_err(FrameError::Malformed)
}

/// The body length that a header announces, if it is within bounds.
fn body_len(header: [u8; HEADER]) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(header) as usize;
    if length > MAX_FRAME { Err(FrameError::TooLarge(length)) } else { Ok(length) }
}

/// Writes one frame.
pub fn write_frame<M: Serialize>(
    stream: &mut impl Write,
    scratch: &mut Vec<u8>,
    message: &M,
    payload: &[u8],
) -> Result<(), FrameError> {
    scratch.clear();
    encode(message, payload, scratch)?;
    stream.write_all(scratch)?;
    Ok(())
}

/// Reads one frame's body into `body`.
pub fn read_frame(stream: &mut impl Read, body: &mut Vec<u8>) -> Result<(), FrameError> {
    let mut header = [0; HEADER];
    read_header(stream, &mut header)?;
    let length = body_len(header)?;
    body.clear();
    let read = stream.by_ref().take(length as u64).read_to_end(body)?;
    if read < length {
        return Err(FrameError::Io(ErrorKind::UnexpectedEof.into()));
    }
    Ok(())
}

/// Reads a header; an end before its first byte is an orderly one.
fn read_header(stream: &mut impl Read, header: &mut [u8; HEADER]) -> Result<(), FrameError> {
    let mut filled = 0;
    while filled < HEADER {
        match stream.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Err(FrameError::Closed),
            Ok(0) => return Err(FrameError::Io(ErrorKind::UnexpectedEof.into())),
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(FrameError::Io(error)),
        }
    }
    Ok(())
}

/// Collects frames from bytes that arrive in any pieces, for a reader that
/// must not block.
#[derive(Debug, Default)]
pub struct Assembler {
    bytes: Vec<u8>,
    start: usize,
}

impl Assembler {
    /// The buffer to append newly arrived bytes to.
    pub fn input(&mut self) -> &mut Vec<u8> {
        if self.start == self.bytes.len() {
            self.bytes.clear();
        } else if self.start > 0 {
            self.bytes.drain(..self.start);
        }
        self.start = 0;
        &mut self.bytes
    }

    /// The next whole frame's body, if it is there.
    pub fn next_body(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let Some((header, rest)) = self.bytes[self.start..].split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = body_len(*header)?;
        if rest.len() < length {
            return Ok(None);
        }
        let body = self.start + HEADER;
        self.start = body + length;
        Ok(Some(&self.bytes[body..self.start]))
    }

    /// Takes out what has arrived beyond the frames that were handed over.
    pub fn into_rest(mut self) -> Vec<u8> {
        self.bytes.split_off(self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Entry, EntryKind, Exec, Reply, Request, WindowSize};

    #[test]
    fn a_message_and_its_payload_survive_any_fragmentation() {
        let mut wire = Vec::new();
        encode(&Request::Stdin, b"hello", &mut wire).unwrap();
        encode(&Request::Signal(15), b"", &mut wire).unwrap();
        for step in 1..wire.len() {
            let mut assembler = Assembler::default();
            let mut seen = Vec::new();
            for piece in wire.chunks(step) {
                assembler.input().extend_from_slice(piece);
                while let Some(body) = assembler.next_body().unwrap() {
                    let (message, payload) = decode::<Request>(body).unwrap();
                    seen.push((message, payload.to_vec()));
                }
            }
            let expected = [(Request::Stdin, b"hello".to_vec()), (Request::Signal(15), Vec::new())];
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn an_oversize_frame_is_refused_on_both_sides() {
        let mut out = vec![7];
        let payload = vec![0; MAX_FRAME];
        let error = encode(&Reply::Stdout, &payload, &mut out).unwrap_err();
        assert!(matches!(error, FrameError::TooLarge(_)));
        assert_eq!(out, [7], "a failed encoding leaves nothing behind");

        let header = u32::MAX.to_le_bytes();
        let error = read_frame(&mut &header[..], &mut Vec::new()).unwrap_err();
        assert!(matches!(error, FrameError::TooLarge(_)));
        let mut assembler = Assembler::default();
        assembler.input().extend_from_slice(&header);
        assert!(matches!(assembler.next_body(), Err(FrameError::TooLarge(_))));
    }

    #[test]
    fn an_end_inside_a_frame_is_not_an_orderly_one() {
        let mut wire = Vec::new();
        encode(&Request::Ping, b"", &mut wire).unwrap();
        let read = |bytes: &[u8]| read_frame(&mut &bytes[..], &mut Vec::new());
        assert!(matches!(read(&[]), Err(FrameError::Closed)));
        for cut in 1..wire.len() {
            assert!(matches!(read(&wire[..cut]), Err(FrameError::Io(_))));
        }
    }

    #[test]
    fn garbage_is_malformed() {
        assert!(matches!(decode::<Request>(&[0xff; 8]), Err(FrameError::Malformed(_))));
    }

    /// Whatever comes, a decoder returns: flipped bits, cuts, lengths that
    /// announce more than there is.
    #[test]
    fn no_damage_makes_a_decoder_panic() {
        let exec = Exec {
            argv: vec![b"sh".to_vec(), b"-c".to_vec()],
            env: vec![(b"A".to_vec(), b"1".to_vec())],
            cwd: Some(b"/".to_vec()),
            tty: Some(WindowSize { rows: 24, columns: 80 }),
            ..Exec::default()
        };
        let entry = Entry {
            path: b"a/b".to_vec(),
            kind: EntryKind::Symlink { target: b"c".to_vec() },
            mtime_ns: -1,
        };
        let mut wire = Vec::new();
        for message in [Request::Exec(exec), Request::Entry(entry.clone()), Request::Signal(9)] {
            encode(&message, b"payload", &mut wire).unwrap();
        }
        encode(&Reply::Entry(entry), b"", &mut wire).unwrap();
        for bit in 0..wire.len() * 8 {
            let mut damaged = wire.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            for start in 0..damaged.len() {
                // Only that it comes back counts, not with what.
                let _request = decode::<Request>(&damaged[start..]);
                let _reply = decode::<Reply>(&damaged[start..]);
            }
        }
        let announces_4_gib = [&[3, 1][..], &[0xff, 0xff, 0xff, 0xff, 0x0f]].concat();
        assert!(decode::<Request>(&announces_4_gib).is_err());
    }
}
