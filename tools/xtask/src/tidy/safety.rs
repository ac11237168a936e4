//! Every unsafe block and implementation says right above why it is sound.

use std::path::Path;

use super::Finding;

/// How far above the reason may stand: a statement that spans lines, and its
/// attributes, may come between.
const LINES_ABOVE_MAX: usize = 8;

/// Checks a Rust file, given as it is and with only its code left.
pub(super) fn check(path: &Path, text: &str, code: &str) -> Vec<Finding> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (index, line) in code.lines().enumerate() {
        if opens_unsafe(line) && !explained(&lines, index) {
            let what = "unsafe without a `// SAFETY:` line that says why it is sound";
            found.push(Finding::new(path, index + 1, what));
        }
    }
    found
}

fn opens_unsafe(code: &str) -> bool {
    code.match_indices("unsafe").any(|(at, word)| {
        let rest = code[at + word.len()..].trim_start();
        rest.starts_with('{') || rest.starts_with("impl ") || rest.starts_with("impl<")
    })
}

/// Whether a reason stands above, with no finished statement in between.
fn explained(lines: &[&str], index: usize) -> bool {
    let first = index.saturating_sub(LINES_ABOVE_MAX);
    for line in lines[first..=index].iter().rev() {
        if let Some((_, reason)) = line.split_once("// SAFETY:") {
            return !reason.trim().is_empty();
        }
        if std::ptr::eq(*line, lines[index]) {
            continue;
        }
        let line = line.trim();
        let comment = line.starts_with("//");
        if !comment && (line.ends_with(';') || line.ends_with('}')) {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::code::blank;
    use super::*;

    fn found(text: &str) -> usize {
        check(Path::new("x.rs"), text, &blank(text)).len()
    }

    #[test]
    fn a_reason_right_above_is_enough() {
        assert_eq!(found("// SAFETY: it is mapped.\nunsafe { f() }"), 0);
        assert_eq!(
            found("// SAFETY: it is mapped,\n// all of it.\nlet x =\n    unsafe { f() };"),
            0
        );
        assert_eq!(found("// SAFETY: no state.\nunsafe impl Send for X {}"), 0);
        assert_eq!(found("// unsafe { f() } is not code\nlet a = \"unsafe { f() }\";"), 0);
        assert_eq!(found("unsafe fn f() {}"), 0);
    }

    #[test]
    fn a_missing_empty_or_foreign_reason_is_found() {
        assert_eq!(found("unsafe { f() }"), 1);
        assert_eq!(found("// SAFETY:\nunsafe { f() }"), 1);
        assert_eq!(found("// SAFETY: of another.\nunsafe { f() };\nlet a = unsafe { g() };"), 1);
        assert_eq!(found("unsafe impl Send for X {}"), 1);
    }
}
