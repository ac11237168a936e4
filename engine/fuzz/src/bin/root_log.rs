//! Fuzzes `Decoder::RootLog`.
#![no_main]

use coppice_engine::fuzzing::Decoder;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| Decoder::RootLog.decode(bytes));
