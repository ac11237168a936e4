//! The console log: what the guest writes to its serial port, in a file.
//!
//! Bounded: a guest that floods its console would fill the disk. At the limit
//! the file starts again with a line that says so and the last few kibibytes,
//! which are remembered for this.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};

/// The file is never longer than this, in bytes.
const LIMIT: u64 = 8 << 20;
/// What is kept when it starts again, in bytes.
const KEPT: usize = 64 << 10;
const NOTICE: &[u8] = b"[the console log reached its limit and starts again here]\n";

/// Writes to the log file, opened for appending.
#[derive(Debug)]
pub(crate) struct ConsoleLog {
    file: File,
    written: u64,
    limit: u64,
    last: VecDeque<u8>,
}

impl ConsoleLog {
    /// Continues the file.
    pub(crate) fn new(file: File) -> Self {
        let written = file.metadata().map_or(0, |metadata| metadata.len());
        Self { file, written, limit: LIMIT, last: VecDeque::new() }
    }

    fn start_again(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        let mut kept = NOTICE.to_vec();
        kept.extend(&self.last);
        self.file.write_all(&kept)?;
        self.written = kept.len() as u64;
        Ok(())
    }

    fn remember(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(KEPT)..];
        let over = (self.last.len() + kept.len()).saturating_sub(KEPT);
        self.last.drain(..over);
        self.last.extend(kept);
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.written + bytes.len() as u64 > self.limit {
            self.start_again()?;
        }
        let written = self.file.write(bytes)?;
        self.written += written as u64;
        self.remember(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_keeps_the_file_short_and_its_end() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = File::options().append(true).open(path.path()).unwrap();
        let mut log = ConsoleLog::new(file);
        log.limit = 200_000;
        for number in 0..100_000 {
            writeln!(log, "line {number}").unwrap();
        }
        let text = std::fs::read_to_string(path.path()).unwrap();
        assert!(text.len() as u64 <= log.limit, "{}", text.len());
        assert!(text.starts_with("[the console log reached its limit"));
        assert!(text.ends_with("line 99998\nline 99999\n"));
    }

    #[test]
    fn what_was_there_stays() {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), "before\n").unwrap();
        let file = File::options().append(true).open(path.path()).unwrap();
        ConsoleLog::new(file).write_all(b"after\n").unwrap();
        assert_eq!(std::fs::read_to_string(path.path()).unwrap(), "before\nafter\n");
    }
}
