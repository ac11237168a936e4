//! The page server against real userfaultfds, through its real channel.

mod failures;
mod fork;
mod live;
mod prefetch;
mod requests;
mod sharing;
mod store;
