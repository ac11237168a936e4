//! The page server against real userfaultfds, through its real channel.

mod evict;
mod failures;
mod fork;
mod live;
mod prefetch;
mod requests;
mod sharing;
mod store;
mod takeover;
