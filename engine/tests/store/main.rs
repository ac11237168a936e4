//! Tests of a whole store on a real disk.

mod catalog;
mod common;
mod damage;
mod round_trip;
