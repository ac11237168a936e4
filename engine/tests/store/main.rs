//! Tests of a whole store on a real disk.

mod common;
mod round_trip;
