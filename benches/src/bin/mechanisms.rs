//! try
use anyhow::Result;
use coppice_benches::{guest::{self, Walk}, machine::Machine, mapping::Mapping};
use std::io::Write;
fn main() -> Result<()> {
    let mut f = std::fs::File::from(rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC)?);
    f.write_all(&guest::image(64 << 20))?;
    let kvm = kvm_ioctls::Kvm::new()?;
    for _ in 0..5 {
        let (mut m, steps) = Machine::fork(&kvm, || Ok(Mapping::of(&f)?))?;
        println!("{steps:?} {}", steps.total_ns());
        println!("{}", m.walk(&Walk::scattered(3, 1000, 8191, false))?);
        println!("{}", m.walk(&Walk::run(3, 100, 8191, true))?);
    }
    Ok(())
}
