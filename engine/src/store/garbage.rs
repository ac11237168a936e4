//! Every decoder against bytes that nobody wrote: none may panic, and none may
//! set aside more memory than the input could fill. The fuzz targets go deeper.

use proptest::prelude::*;

use crate::catalog::SnapshotRecord;
use crate::depot::Spot;
use crate::depot::hint::Hint;
use crate::fuzzing::Decoder;
use crate::id::{ObjectKey, PackId};
use crate::pack::frame::{self, FrameKind};
use crate::tree::patch::Patch;
use crate::tree::{Node, RootRecord};
use crate::units::to_u32;

fn decode_all(bytes: &[u8]) {
    Decoder::ALL.iter().for_each(|decoder| decoder.decode(bytes));
}

/// The first bytes of things that decoders look closer at.
fn beginnings() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(Vec::new()),
        Just(frame::MAGIC.to_vec()),
        Just(b"CPPKEND1\x01\0\0\0".to_vec()),
        Just(b"CPRL".to_vec()),
        Just(b"CPMAP001".to_vec()),
        Just(b"CPROOTS1\x01\0\0\0\0\0\0\0".to_vec()),
        Just(b"CPROOTS1\x01\0\0\0\0\0\0\0CPRL".to_vec()),
        Just(b"CPPACK01\x01\0\0\0\0\0\0\0CPF1\x00\x01\x00\x00".to_vec()),
        Just(vec![1, 3, 3, 1]),
        Just(vec![1, 0, 1, 0]),
        Just(vec![0, 0, 1, 0]),
        Just(vec![0, 1, 1, 0]),
        Just(vec![1, 1, 2, 0]),
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

/// Writes what fuzzing begins with: one sound input for each decoder. Fuzz
/// targets take every checksum for zeros, so these have zeros there.
#[test]
#[ignore = "writes the corpus; run it when a format changes"]
fn write_the_corpus() {
    let zeroed = |mut bytes: Vec<u8>, sums: std::ops::Range<usize>| {
        bytes[sums].fill(0);
        bytes
    };
    let mut node = Node::empty(0);
    let mut base = Node::empty(0);
    for slot in [0, 1, 9, 127] {
        node.set(slot, Some([7; 32]));
        base.set(slot / 2, Some([8; 32]));
    }
    let patch = Patch::between((base.id(), &base), (node.id(), &node)).expect("few changes");
    let root =
        RootRecord { splitter: crate::tree::Splitter::Fixed4K, len: 5000, top: Some(node.id()) };
    let images = vec![(crate::catalog::Role::Memory, root.image())];
    let record = SnapshotRecord { images, config: b"config".to_vec(), parent: None };
    let event = crate::catalog::sample_event();
    let keys = vec![crate::id::ChunkId::of(b"a").key(); 2];
    let encoded = frame::encode(FrameKind::Pages, &[1; 8192], keys.clone(), 1).bytes;
    let mut directory = crate::pack::Directory::empty();
    directory.push(FrameKind::Pages, 200, &keys, &[]);
    directory.push(FrameKind::Pieces, 200, &keys, &[5000, 1]);
    let tables = directory.trailer(crate::id::PackId(1), &[3; 32]);
    let tail = tables.len() - 32..tables.len();
    let mut objects = vec![1];
    crate::pack::object::put(&mut objects, crate::pack::ObjectKind::Node, &node.encode());
    let mut gathered = crate::pack::pieces::PieceFrame::default();
    for piece in [&[1; 50][..], &[2; 1], &[3; 9]] {
        gathered.push(keys[0], piece);
    }
    let (plain, _) = gathered.take().expect("three chunks");
    let pieces = [&[3][..], &plain].concat();
    let log = include_bytes!("../../tests/golden/format-1/roots.log");
    let store = crate::store::Store::open_on(
        std::sync::Arc::new(crate::io::SimDisk::new()),
        &crate::settings::Settings {
            index: crate::settings::IndexKind::Memory,
            ..Default::default()
        },
    );
    let store = store.expect("a store");
    let mut session = store.begin().expect("a session");
    let image = session.blob(&[5; 9000]).expect("an image");
    let record_of = SnapshotRecord {
        images: vec![(crate::catalog::Role::State, image)],
        config: Vec::new(),
        parent: None,
    };
    session.commit(&record_of, crate::ingest::CommitOptions::default()).expect("a commit");
    let map = store.page_map(&image).expect("a map").to_bytes();
    let key = ObjectKey([0; ObjectKey::LEN]);
    let spot = Spot { pack: PackId(300), offset: 16, len: 5000, count: 16, slot: 3 };
    let chunks = vec![(0, spot), (1, Spot { slot: 4, ..spot }), (9, Spot { offset: 5016, ..spot })];
    let hint = Hint { own: Some(spot), base: Some(key), chunks }.encode(&key);
    let hint_sum = hint.len() - 8..hint.len();
    let zeroed_frame = zeroed(encoded.clone(), 64..80);
    let mut whole = crate::pack::Directory::empty();
    whole.push(FrameKind::Pages, to_u32(encoded.len()), &keys, &[]);
    let whole_tail = whole.trailer(PackId(1), &[3; 32]);
    let sums = whole_tail.len() - 32..whole_tail.len();
    let head = crate::pack::directory::pack_header().to_vec();
    let pack = [head, zeroed_frame.clone(), zeroed(whole_tail, sums)].concat();
    let row = [7_u32.to_le_bytes().as_slice(), &2_u32.to_le_bytes(), &[5; 32]].concat();
    let seeds = [
        ("pack", pack),
        ("root_log", zeroed(log.to_vec(), 48..64)),
        ("patched_node", [base.encode(), patch.encode()].concat()),
        ("ledger_rows", row),
        ("frame", zeroed(encoded, 64..80)),
        ("objects", objects),
        ("pack_tables", zeroed(tables, tail)),
        ("pieces", pieces),
        ("node", node.encode()),
        ("stream_node", crate::tree::stream::sample_node(0).encode()),
        ("patch", patch.encode()),
        ("root", root.encode()),
        ("snapshot", record.encode()),
        ("event", event.encode()),
        ("root_log_entry", zeroed(log[16..].to_vec(), 32..48)),
        ("page_map", zeroed(map, 32..48)),
        ("hint", zeroed(hint, hint_sum)),
        ("qcow2", crate::ingest::qcow2::tests::sound()),
    ];
    for (decoder, seed) in seeds {
        let folder =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(decoder);
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join("sound"), seed).expect("a seed");
    }
}
