//! How much memory the host has, and has left.

use anyhow::{Context, Result};

/// Bytes that it could still give out.
pub(crate) fn available() -> Result<u64> {
    meminfo("MemAvailable:")
}

/// Bytes that it has.
pub(crate) fn total() -> Result<u64> {
    meminfo("MemTotal:")
}

/// Share of the last 10 seconds in which some task waited for memory, in
/// hundredths of a percent; 0 where the kernel does not say.
pub(crate) fn stalled() -> u64 {
    std::fs::read_to_string("/proc/pressure/memory").map_or(0, |text| stalled_in(&text))
}

fn stalled_in(text: &str) -> u64 {
    let some = text.lines().find_map(|line| line.strip_prefix("some avg10="));
    let digits = some.and_then(|rest| rest.split_whitespace().next()).unwrap_or_default();
    // Two digits behind the point, always.
    digits.replace('.', "").parse().unwrap_or(0)
}

fn meminfo(field: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let kib: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("/proc/meminfo has no {field}"))?;
    Ok(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_read() {
        let text = "some avg10=12.34 avg60=1.00 avg300=0.00 total=5\nfull avg10=0.10 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(stalled_in(text), 1234);
        assert_eq!(stalled_in("some avg10=0.00 avg60=0"), 0);
        assert_eq!(stalled_in("nonsense"), 0);
        let (total, available) = (total().unwrap(), available().unwrap());
        assert!(total >= available && available > 0);
    }
}
