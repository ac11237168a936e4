//! Words that say that something is unfinished.

use std::path::Path;

use super::Finding;

/// In two halves, so that this file is not its own first finding.
const UNFINISHED: [(&str, &str); 7] = [
    ("TO", "DO"),
    ("FIX", "ME"),
    ("XX", "X:"),
    ("to", "do!("),
    ("unimple", "mented!("),
    ("not implemented", " yet"),
    ("not yet", " implemented"),
];

/// Checks a text of any kind.
pub(super) fn check(path: &Path, text: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for (front, back) in UNFINISHED {
            let word = format!("{front}{back}");
            if line.contains(&word) {
                let what = format!("says {word}: finish it, or leave it out");
                found.push(Finding::new(path, index + 1, what));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_is_found_and_plain_text_is_not() {
        let path = Path::new("x.rs");
        for (front, back) in UNFINISHED {
            assert_eq!(check(path, &format!("fine\n// {front}{back} x")).len(), 1, "{front}");
        }
        assert!(check(path, "all that there is to do is done").is_empty());
    }
}
