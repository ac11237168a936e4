//! Boot, pause, save, restore, connect, end.

use crate::guest::{CMDLINE, guest};
use crate::harness::Machine;

#[test]
fn boots() {
    let Some(guest) = guest() else { return };
    let start = std::time::Instant::now();
    let mut machine = Machine::boot(&guest.kernel, &guest.root, 64, CMDLINE);
    machine.resume();
    machine.wait_for_console("GUEST READY");
    println!("boot to init: {:?}\n{}", start.elapsed(), machine.log());
}
