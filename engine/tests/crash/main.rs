//! What a store is worth when the power goes, a write fails or a flush fails,
//! at every possible moment of a run.

mod full;
mod gc;
mod index;
mod power;
mod rebuild;
mod repair;
#[path = "../told/mod.rs"]
mod told;
mod trouble;
mod workload;

use told::tried;
