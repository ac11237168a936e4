//! Tests of the whole: the binary, against real stores and real machines. Each
//! has a store and a supervisor of its own.

mod budget;
mod freed;
mod gc;
mod lineage;
mod live;
mod machine;
mod net;
mod off;
mod page_cache;
mod qcow2;
mod read_only;
mod reader;
mod store;
mod stream;
mod takeover;
