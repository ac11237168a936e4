//! The rules of this tree that no compiler checks. Each check takes a file's
//! path and text and returns what is wrong, so that tests can show it bad files.

mod code;
mod layers;
mod links;
mod manifests;
mod safety;
mod words;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::checkout::Checkout;

/// Lines of the longest source file: who needs more has two ideas in one file.
const LINES_MAX: usize = 600;

/// One violation of a rule.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    path: PathBuf,
    line: usize,
    what: String,
}

impl Finding {
    /// `line` counts from 1.
    fn new(path: &Path, line: usize, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, what: what.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}", self.path.display(), self.line, self.what)
    }
}

/// Checks the whole tree.
pub(crate) fn run(checkout: &Checkout) -> Result<()> {
    let findings = findings(checkout)?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("tidy found {} violations of the rules", findings.len());
    }
    eprintln!("xtask: the tree is tidy");
    Ok(())
}

fn findings(checkout: &Checkout) -> Result<Vec<Finding>> {
    let mut all = Vec::new();
    for path in checkout.files()? {
        let extension = path.extension().and_then(|extension| extension.to_str());
        if !matches!(extension, Some("rs" | "md" | "toml" | "sh" | "py")) {
            continue;
        }
        let text = std::fs::read_to_string(checkout.root().join(&path))
            .with_context(|| format!("cannot read {}", path.display()))?;
        all.extend(words::check(&path, &text));
        match extension {
            Some("rs") => all.extend(check_rust(&path, &text)),
            Some("md") => all.extend(links::check(checkout.root(), &path, &text)),
            Some("toml") if path.ends_with("Cargo.toml") => {
                all.extend(manifests::check(&path, &text));
            }
            _ => {}
        }
    }
    all.extend(crate::peers::publish::stale(checkout)?.into_iter().map(|path| {
        let what = "is not what docs/figures/peers.json makes: `cargo xtask plots` renews it";
        Finding::new(Path::new(path), 1, what)
    }));
    Ok(all)
}

fn check_rust(path: &Path, text: &str) -> Vec<Finding> {
    let code = code::blank(text);
    let mut found = layers::check(path, &code);
    found.extend(safety::check(path, text, &code));
    let lines = text.lines().count();
    if lines > LINES_MAX {
        found.push(Finding::new(path, lines, format!("has more than {LINES_MAX} lines: split it")));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_tree_is_tidy() {
        let checkout = Checkout::find().unwrap();
        let found: Vec<String> =
            findings(&checkout).unwrap().iter().map(ToString::to_string).collect();
        assert!(found.is_empty(), "{}", found.join("\n"));
    }

    #[test]
    fn the_tree_is_really_read() {
        let files = Checkout::find().unwrap().files().unwrap();
        for path in ["engine/src/lib.rs", "runtime/src/lib.rs", "tools/xtask/src/main.rs"] {
            assert!(files.contains(&PathBuf::from(path)), "{path} is not among the files");
        }
    }

    #[test]
    fn a_long_file_is_found() {
        let path = Path::new("benches/src/long.rs");
        assert!(check_rust(path, &"\n".repeat(LINES_MAX)).is_empty());
        assert_eq!(check_rust(path, &"\n".repeat(LINES_MAX + 1)).len(), 1);
    }
}
