//! Fuzzes `Decoder::Qcow2`.
#![no_main]

use coppice_engine::fuzzing::Decoder;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| Decoder::Qcow2.decode(bytes));
