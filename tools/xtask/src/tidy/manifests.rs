//! Every package has the workspace's licence, lints and privacy, and takes its
//! dependencies' versions from the workspace.

use std::path::Path;

use super::Finding;

const LICENCE: &str = "license = \"Apache-2.0 OR MIT\"";
const WANTED: [&str; 3] =
    ["license.workspace = true", "publish.workspace = true", "edition.workspace = true"];

/// Checks a `Cargo.toml`.
pub(super) fn check(path: &Path, text: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    let has = |wanted: &str| text.lines().any(|line| line.trim() == wanted);
    let mut want = |wanted: &str| {
        if !has(wanted) {
            found.push(Finding::new(path, 1, format!("lacks `{wanted}`")));
        }
    };
    if has("[workspace.package]") {
        want(LICENCE);
    }
    if has("[package]") && has("[workspace]") {
        // A workspace of its own takes nothing from ours but the licence.
        want(LICENCE);
    } else if has("[package]") {
        WANTED.into_iter().for_each(&mut want);
        want("[lints]");
        want("workspace = true");
        found.extend(versions(path, text));
    }
    found
}

/// Dependencies with a version or source of their own.
fn versions(path: &Path, text: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut in_dependencies = false;
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            in_dependencies = line.trim_end_matches(']').ends_with("dependencies");
        } else if in_dependencies
            && !line.is_empty()
            && !line.starts_with('#')
            && !line.contains("workspace = true")
        {
            let what = format!("`{line}` does not take its version from the workspace");
            found.push(Finding::new(path, index + 1, what));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspace_of_its_own_needs_the_licence() {
        let text = format!("[workspace]\n[package]\n{LICENCE}\n[dependencies]\nx = \"1\"\n");
        assert!(check(Path::new("fuzz/Cargo.toml"), &text).is_empty());
        assert_eq!(check(Path::new("fuzz/Cargo.toml"), "[workspace]\n[package]\n").len(), 1);
    }

    const GOOD: &str = "[package]\nedition.workspace = true\nlicense.workspace = true\n\
        publish.workspace = true\n[lints]\nworkspace = true\n\
        [dependencies]\nserde.workspace = true\n# why\nx = { workspace = true }\n";

    #[test]
    fn a_package_of_the_workspace_is_fine() {
        assert!(check(Path::new("Cargo.toml"), GOOD).is_empty());
    }

    #[test]
    fn what_a_package_lacks_is_found() {
        for line in ["license.workspace = true\n", "[lints]\n", "publish.workspace = true\n"] {
            assert_eq!(check(Path::new("Cargo.toml"), &GOOD.replace(line, "")).len(), 1, "{line}");
        }
        let own = GOOD.replace("serde.workspace = true", "serde = \"1\"");
        assert_eq!(check(Path::new("Cargo.toml"), &own).len(), 1);
        let other = "[workspace.package]\nlicense = \"GPL-2.0\"\n";
        assert_eq!(check(Path::new("Cargo.toml"), other).len(), 1);
    }
}
