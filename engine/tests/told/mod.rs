//! Telling how much a suite tried. Tests that pass have their output swallowed,
//! so this goes to standard error itself.

use std::io::Write;

/// Says how many cases of what were tried; there must have been some.
pub(crate) fn tried(cases: u64, what: &str) {
    assert!(cases > 0, "no {what} were tried");
    let line = format!("tried: {cases} {what}\n");
    // Whoever closed standard error does not want to know.
    drop(std::io::stderr().lock().write_all(line.as_bytes()));
}
