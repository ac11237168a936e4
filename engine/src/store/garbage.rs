//! Every decoder against bytes that nobody wrote: none may panic, and none may
//! set aside more memory than the input could fill.

use proptest::prelude::*;

use crate::catalog::{Event, SnapshotRecord};
use crate::pack::directory::{FOOTER_LEN, Footer};
use crate::pack::frame::{self, FrameHeader, FrameKind};
use crate::pack::object;
use crate::read::PageMap;
use crate::tree::patch::Patch;
use crate::tree::{Node, RootRecord};

fn decode_all(bytes: &[u8]) {
    let _ = FrameHeader::parse(bytes);
    drop(frame::decode(bytes));
    if let Some(last) = bytes.last_chunk::<FOOTER_LEN>()
        && let Ok(footer) = Footer::parse(last)
    {
        drop(footer.parse_tables(&bytes[..bytes.len() - FOOTER_LEN]));
    }
    drop(Node::decode(bytes));
    drop(Patch::decode(bytes));
    let _ = RootRecord::decode(bytes);
    drop(SnapshotRecord::decode(bytes));
    drop(Event::decode(bytes));
    drop(crate::catalog::decode_log_entry(bytes));
    drop(PageMap::from_bytes(bytes));
    let plain = frame::Frame { kind: FrameKind::Objects, count: 1, plain: bytes.to_vec() };
    drop(object::list(&plain));
}

/// The first bytes of things that decoders look closer at.
fn beginnings() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(Vec::new()),
        Just(frame::MAGIC.to_vec()),
        Just(b"CPPKEND1\x01\0\0\0".to_vec()),
        Just(b"CPRL".to_vec()),
        Just(b"CPMAP001".to_vec()),
        Just(vec![1, 0, 1, 0]),
        Just(vec![0, 0, 1, 0]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_decoder_panics(begin in beginnings(), rest in prop::collection::vec(any::<u8>(), 0..400)) {
        decode_all(&[begin, rest].concat());
    }

    #[test]
    fn no_decoder_panics_on_small_numbers(
        begin in beginnings(),
        rest in prop::collection::vec(prop_oneof![Just(0), Just(0), 0..4_u8, Just(255)], 0..200),
    ) {
        decode_all(&[begin, rest].concat());
    }

    #[test]
    fn what_decodes_is_canonical(bytes in prop::collection::vec(prop_oneof![Just(0), 0..3_u8], 0..120)) {
        if let Ok(node) = Node::decode(&bytes) {
            prop_assert_eq!(node.encode(), bytes.clone());
        }
        if let Ok(root) = RootRecord::decode(&bytes) {
            prop_assert_eq!(root.encode(), bytes.clone());
        }
        if let Ok(record) = SnapshotRecord::decode(&bytes) {
            prop_assert_eq!(record.encode(), bytes);
        }
    }
}
