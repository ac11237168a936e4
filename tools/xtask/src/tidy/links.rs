//! Links between our documents lead somewhere.

use std::path::Path;

use super::Finding;

/// Checks the relative links of a Markdown file.
pub(super) fn check(root: &Path, path: &Path, text: &str) -> Vec<Finding> {
    let folder = root.join(path.parent().unwrap_or(Path::new("")));
    let mut found = Vec::new();
    let mut fenced = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for target in targets(line) {
            let file = target.split('#').next().unwrap_or_default();
            let elsewhere = target.contains("://") || target.starts_with("mailto:");
            if !elsewhere && !file.is_empty() && !folder.join(file).exists() {
                found.push(Finding::new(
                    path,
                    index + 1,
                    format!("links to {file}, which is not there"),
                ));
            }
        }
    }
    found
}

/// What stands between `](` and `)`, outside of code.
fn targets(line: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (index, part) in line.split('`').enumerate() {
        if index % 2 == 1 && line.matches('`').count() > index {
            continue;
        }
        for rest in part.split("](").skip(1) {
            if let Some((target, _)) = rest.split_once(')') {
                found.push(target.split_whitespace().next().unwrap_or_default());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> usize {
        check(Path::new(env!("CARGO_MANIFEST_DIR")), Path::new("README.md"), text).len()
    }

    #[test]
    fn links_that_lead_somewhere_are_fine() {
        assert_eq!(found("[a](Cargo.toml) and [b](src/main.rs#x) and [c](https://x.y/z)"), 0);
        assert_eq!(found("[`a`](Cargo.toml) [b](#here) `[c](nowhere)`"), 0);
        assert_eq!(found("```\n[a](nowhere)\n```"), 0);
    }

    #[test]
    fn links_that_lead_nowhere_are_found() {
        assert_eq!(found("[a](nowhere.md)"), 1);
        assert_eq!(found("[`a`](nowhere.md#x) and [b](Cargo.toml)"), 1);
        assert_eq!(found("fine\n[a](../xtask/nowhere) [b](also/nowhere)"), 2);
    }
}
