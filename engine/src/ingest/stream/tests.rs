//! The limit of a stream, which takes too long to write.

use std::sync::Arc;

use super::*;
use crate::error::ErrorKind;
use crate::io::SimDisk;
use crate::settings::{IndexKind, Settings};
use crate::store::Store;

#[test]
fn nothing_is_longer_than_16_tib() {
    let settings = Settings { index: IndexKind::Memory, ..Settings::default() };
    let store = Store::open_on(Arc::new(SimDisk::new()), &settings).expect("it opens");
    let mut session = store.begin().expect("a session");
    let mut writer = session.stream();
    // All of it but a byte, in a chunk that only a test can make.
    let most = usize::try_from(IMAGE_LEN_MAX - 5).expect("64 bits");
    writer.tree.push(None, most, writer.sink).expect("a chunk");
    writer.append(&[0; 4]).expect("it fits");
    let error = writer.append(&[0; 2]).expect_err("too long");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(matches!(error, StoreError::ImageTooLong(len) if len == IMAGE_LEN_MAX + 1));
    writer.append(&[0]).expect("the last byte fits");
    assert_eq!(writer.finish().expect("an image").len, IMAGE_LEN_MAX);
}
