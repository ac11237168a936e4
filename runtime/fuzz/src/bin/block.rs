//! Fuzzes `Target::Block`.
#![no_main]

use coppice_runtime::fuzzing::Target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| Target::Block.play(bytes));
