//! Every decoder of bytes from outside under one roof, for fuzzers and for
//! tests with bytes that nobody wrote. Not part of the engine's interface.

use std::fs::File;
use std::io::Write;

use crate::catalog::{Event, SnapshotRecord};
use crate::depot::hint::Hint;
use crate::id::{ObjectKey, PackId};
use crate::io::{Disk, SimDisk};
use crate::pack::directory::{FOOTER_LEN, Footer};
use crate::pack::frame::{self, FrameHeader, FrameKind};
use crate::pack::{object, pieces, scan};
use crate::read::PageMap;
use crate::tree::patch::Patch;
use crate::tree::stream::StreamNode;
use crate::tree::{Node, RootRecord};
use crate::units::to_usize;

/// A decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoder {
    /// Header and stored bytes of a frame.
    Frame,
    /// The objects in the plaintext of a frame.
    Objects,
    /// The chunks in the plaintext of a frame of pieces.
    Pieces,
    /// Tables and footer of a pack.
    PackTables,
    /// A tree node.
    Node,
    /// A node of a stream's tree.
    StreamNode,
    /// A tree node as a difference.
    Patch,
    /// The root of an image.
    Root,
    /// A snapshot record.
    Snapshot,
    /// A catalog event.
    Event,
    /// An entry of the root log.
    RootLogEntry,
    /// A page map, as the page server gets it.
    PageMap,
    /// Where a leaf and its chunks lie.
    Hint,
    /// A qcow2 disk.
    Qcow2,
    /// A whole pack, whose tables may be of no use.
    Pack,
    /// A whole root log.
    RootLog,
    /// A node and a patch on it.
    PatchedNode,
    /// Rows of the ledger.
    LedgerRows,
}

impl Decoder {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::Frame,
        Self::Objects,
        Self::Pieces,
        Self::PackTables,
        Self::Node,
        Self::StreamNode,
        Self::Patch,
        Self::Root,
        Self::Snapshot,
        Self::Event,
        Self::RootLogEntry,
        Self::PageMap,
        Self::Hint,
        Self::Qcow2,
        Self::Pack,
        Self::RootLog,
        Self::PatchedNode,
        Self::LedgerRows,
    ];

    /// Decodes. What comes of it does not matter, as long as it is no panic,
    /// takes no more memory than the bytes could fill, and what is canonical
    /// encodes to the same bytes.
    pub fn decode(self, bytes: &[u8]) {
        match self {
            Self::Frame => {
                let _ = FrameHeader::parse(bytes);
                drop(frame::decode(bytes));
            }
            Self::Objects => {
                let kind = FrameKind::Objects;
                let count = bytes.first().copied().map_or(0, u32::from);
                let plain = bytes.get(1..).unwrap_or_default().to_vec();
                let frame = frame::Frame::new(kind, count, plain);
                let listed = object::list(&frame);
                for slot in 0..=count {
                    let found = frame.object(slot).ok().flatten();
                    let listed = listed.as_ref().ok();
                    let expected = listed.and_then(|all| all.get(to_usize(u64::from(slot))));
                    assert_eq!(found.as_ref(), expected, "both ways find the same object");
                }
            }
            Self::Pieces => {
                let kind = FrameKind::Pieces;
                let count = bytes.first().copied().map_or(0, u32::from);
                let plain = bytes.get(1..).unwrap_or_default().to_vec();
                drop(pieces::list(&frame::Frame::new(kind, count, plain)));
            }
            Self::PackTables => pack_tables(bytes),
            Self::Node => same(Node::decode(bytes).ok().map(|node| node.encode()), bytes),
            Self::StreamNode => {
                same(StreamNode::decode(bytes).ok().map(|node| node.encode()), bytes);
            }
            Self::Patch => drop(Patch::decode(bytes)),
            Self::Root => same(RootRecord::decode(bytes).ok().map(|root| root.encode()), bytes),
            Self::Snapshot => same(SnapshotRecord::decode(bytes).ok().map(|it| it.encode()), bytes),
            Self::Event => drop(Event::decode(bytes)),
            Self::RootLogEntry => drop(crate::catalog::decode_log_entry(bytes)),
            Self::PageMap => drop(PageMap::from_bytes(bytes)),
            Self::Hint => hint(bytes),
            Self::Qcow2 => qcow2(bytes),
            Self::Pack => pack(bytes),
            Self::RootLog => drop(crate::catalog::decode_log(bytes)),
            Self::PatchedNode => patched_node(bytes),
            Self::LedgerRows => crate::ledger::decode_rows(bytes),
        }
    }
}

fn same(encoded: Option<Vec<u8>>, bytes: &[u8]) {
    if let Some(encoded) = encoded {
        assert_eq!(encoded, bytes, "what decodes is canonical");
    }
}

/// A number may have several forms, but what is read must survive.
fn hint(bytes: &[u8]) {
    let key = ObjectKey([0; ObjectKey::LEN]);
    if let Ok(hint) = Hint::decode(&key, bytes) {
        assert_eq!(Hint::decode(&key, &hint.encode(&key)), Ok(hint), "what is read survives");
    }
}

fn pack_tables(bytes: &[u8]) {
    if let Some(last) = bytes.last_chunk::<FOOTER_LEN>()
        && let Ok(footer) = Footer::parse(last)
    {
        drop(footer.parse_tables(&bytes[..bytes.len() - FOOTER_LEN]));
    }
}

/// Lists it and reads what it lists, as a check and a repair do.
fn pack(bytes: &[u8]) {
    let disk = SimDisk::new();
    let Ok(file) = disk.create("pack") else { return };
    if file.write_all_at(0, bytes).is_err() {
        return;
    }
    let number = PackId(1);
    let Ok(listing) = scan::list(&*file, number) else { return };
    for span in &listing.directory.frames {
        if let Ok(frame) = scan::read_frame(&*file, number, span) {
            drop(scan::keys_of(&frame));
        }
    }
    drop(listing.directory.trailer(number, &[0; 32]));
}

/// A full node, as long as it says, and behind it a patch.
fn patched_node(bytes: &[u8]) {
    let count =
        bytes.get(2..4).and_then(|len| len.first_chunk()).map(|len| u16::from_le_bytes(*len));
    let node_len = 20 + 32 * usize::from(count.unwrap_or(0));
    let Some((node, patch)) = bytes.split_at_checked(node_len) else { return };
    if let (Ok(node), Ok(patch)) = (Node::decode(node), Patch::decode(patch)) {
        drop(patch.apply(&node));
    }
}

/// Through a file in memory, as the reader wants one.
fn qcow2(bytes: &[u8]) {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let Ok(file) = rustix::fs::memfd_create("qcow2", flags) else { return };
    let mut file = File::from(file);
    if file.write_all(bytes).is_ok() {
        drop(crate::ingest::read_qcow2(&file));
    }
}
