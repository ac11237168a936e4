//! Tests of a whole store on a real disk.

mod catalog;
mod common;
mod damage;
mod full;
mod gc;
mod golden;
mod hints;
#[cfg(feature = "rocksdb")]
mod index_damage;
mod life;
mod model;
mod root;
mod round_trip;
mod sharing;
mod slow;
mod stream;
mod stream_damage;
mod stream_root;
#[path = "../told/mod.rs"]
mod told;
mod view;

use told::tried;
