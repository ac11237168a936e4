//! What a store is worth when the power goes, a write fails or a flush fails,
//! at every possible moment of a run.

mod gc;
mod power;
mod repair;
mod trouble;
mod workload;
