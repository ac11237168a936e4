//! What this process has used so far, by the kernel's own account.

use std::ops::Sub;

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};

/// CPU time and bytes written, since the process began.
#[derive(Debug, Clone, Copy, Default)]
pub struct Effort {
    /// User and system time of all threads, in nanoseconds.
    pub cpu_ns: u64,
    /// Bytes that it made dirty in files, from `/proc/self/io`.
    pub written: u64,
}

impl Effort {
    /// Asks the kernel.
    pub fn now() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/self/io").context("/proc/self/io")?;
        let written = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
        let written = written.context("/proc/self/io has no `write_bytes`")?.parse()?;
        Ok(Self { cpu_ns: cpu_ns(ClockId::ProcessCPUTime), written })
    }
}

impl Sub for Effort {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { cpu_ns: self.cpu_ns - before.cpu_ns, written: self.written - before.written }
    }
}

/// CPU time of the calling thread, in nanoseconds.
pub fn thread_cpu_ns() -> u64 {
    cpu_ns(ClockId::ThreadCPUTime)
}

fn cpu_ns(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Memory of this process.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Resident {
    /// What it has itself: heap and stacks.
    pub anonymous_bytes: u64,
    /// All that is mapped, the most so far.
    pub peak_bytes: u64,
}

impl Resident {
    /// Asks the kernel.
    pub fn now() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
        let field = |name: &str| -> Result<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).context("a field")?;
            Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
        };
        Ok(Self { anonymous_bytes: field("RssAnon:")?, peak_bytes: field("VmHWM:")? })
    }

    /// Begins a new peak.
    pub fn forget_peak() {
        // Only a figure is lost where this is not allowed.
        drop(std::fs::write("/proc/self/clear_refs", "5"));
    }
}

/// A small generator; the same seed gives the same numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Of a seed; any will do.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number (xorshift64*).
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next number below a limit, which is not 0.
    ///
    /// # Errors
    /// If a number does not fit.
    pub fn below(&mut self, limit: usize) -> Result<usize> {
        Ok(usize::try_from(self.number() % u64::try_from(limit)?)?)
    }

    /// Fills bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&self.number().to_le_bytes()[..word.len()]);
        }
    }
}
