//! Hostile files: whatever the bytes, reading ends, without a panic and
//! without memory that the file could not fill.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use proptest::prelude::*;

use super::Chain;
use crate::io::SimDisk;
use crate::settings::{IndexKind, Settings};
use crate::store::Store;
use crate::units::PAGE_LEN;

const CLUSTER: usize = 512;

/// A small sound image of version 3: header, one upper table, one lower, two
/// clusters of data.
pub(crate) fn sound() -> Vec<u8> {
    let mut bytes = vec![0; 5 * CLUSTER];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &super::MAGIC);
    put(4, &3_u32.to_be_bytes());
    put(20, &9_u32.to_be_bytes());
    put(24, &30_000_u64.to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &512_u64.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(512, &1024_u64.to_be_bytes());
    put(1024 + 8 * 3, &1536_u64.to_be_bytes());
    put(1024 + 8 * 50, &2048_u64.to_be_bytes());
    put(1536, &[7; 1024]);
    bytes
}

fn import(bytes: &[u8]) -> Result<(u64, u64), crate::error::StoreError> {
    let mut file: File = tempfile::tempfile().expect("a temporary file");
    file.write_all(bytes).expect("a write");
    let settings = Settings { index: IndexKind::Memory, ..Settings::default() };
    let store = Store::open_on(Arc::new(SimDisk::new()), &settings).expect("a store");
    let mut session = store.begin().expect("a session");
    let mut disk = Chain::open(&file, &[])?;
    let mut writer = session.image(disk.len().min(1 << 30), None)?;
    disk.for_each(|at, bytes| writer.write(at / PAGE_LEN as u64, bytes))?;
    let image = writer.finish()?;
    Ok((disk.len(), image.len))
}

#[test]
fn the_sound_image_is_read() {
    assert_eq!(import(&sound()).expect("it is sound"), (30_000, 30_000));
}

#[test]
fn a_cluster_is_used_once_and_lies_in_the_file() {
    for (entry, problem) in
        [(1536_u64, "used twice"), (1 << 40, "not in the file"), (1024, "twice")]
    {
        let mut bytes = sound();
        bytes[1024 + 8 * 51..1024 + 8 * 52].copy_from_slice(&entry.to_be_bytes());
        let error = import(&bytes).expect_err("it is damaged").to_string();
        assert!(error.contains(problem), "{error}");
    }
}

/// Memory follows what is used, not how long the file says that it is.
#[test]
fn an_endless_sparse_file_takes_no_memory() {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create("disk", flags).expect("a file"));
    file.write_all(&sound()).expect("a write");
    file.set_len(1 << 62).expect("a hole");
    let mut read = 0;
    let mut disk = Chain::open(&file, &[]).expect("it is sound");
    let visit = &mut |_, bytes: &[u8]| {
        read += bytes.len();
        Ok(())
    };
    disk.for_each(visit).expect("it is read");
    assert!(read > 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_upset_it(changes in prop::collection::vec((0..5 * CLUSTER, any::<u8>()), 1..12), cut in 0..5 * CLUSTER + 1) {
        let mut bytes = sound();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        bytes.truncate(cut);
        drop(import(&bytes));
    }

    #[test]
    fn no_header_upsets_it(at in 0..112_usize, field in any::<[u8; 4]>(), table in prop::collection::vec(any::<u64>(), 64)) {
        let mut bytes = sound();
        bytes[at..at + 4].copy_from_slice(&field);
        for (entry, slot) in table.iter().zip(bytes[1024..1536].as_chunks_mut::<8>().0) {
            *slot = (entry & 0xc000_0000_0000_ffff).to_be_bytes();
        }
        drop(import(&bytes));
    }
}
