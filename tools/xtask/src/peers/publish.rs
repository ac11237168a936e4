//! `cargo xtask plots`: renews all that our pages say of `bench-peers` from
//! what it printed: the plots, the tables, and figures within sentences. The
//! tree keeps the JSON, and tidy compares.
//!
//! In a page, what is made stands between `<!-- peers:NAME -->` and
//! `<!-- /peers -->`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::report::Report;
use super::{plots, table};
use crate::checkout::Checkout;

/// Which figures to publish.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What `cargo xtask bench-peers` printed; it is copied to
    /// docs/figures/peers.json
    file: PathBuf,
}

/// Where the tree keeps what was printed.
const KEPT: &str = "docs/figures/peers.json";
/// Pages with something made in them.
const PAGES: [&str; 2] = ["docs/performance.md", "README.md"];

/// Writes all that is made from the file.
pub(crate) fn run(checkout: &Checkout, options: &Options) -> Result<()> {
    let report = Report::read(&options.file)?;
    for (path, contents) in made(checkout, &report)? {
        let path = checkout.path(path);
        std::fs::create_dir_all(path.parent().context("a file is in a folder")?)?;
        std::fs::write(&path, contents)
            .with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("xtask: {}", path.display());
    }
    Ok(())
}

/// Files of the tree that are not what the kept JSON makes.
pub(crate) fn stale(checkout: &Checkout) -> Result<Vec<&'static str>> {
    let report = Report::read(&checkout.path(KEPT))?;
    let mut stale = Vec::new();
    for (path, contents) in made(checkout, &report)? {
        if std::fs::read_to_string(checkout.path(path)).ok() != Some(contents) {
            stale.push(path);
        }
    }
    Ok(stale)
}

/// Every file that is made, relative to the root, and what should be in it.
fn made(checkout: &Checkout, report: &Report) -> Result<Vec<(&'static str, String)>> {
    let mut files = vec![(KEPT, report.json()? + "\n")];
    files.extend(plots::plots(report));
    for page in PAGES {
        let text = read(&checkout.path(page))?;
        files.push((page, renew(&text, report).with_context(|| page.to_owned())?));
    }
    Ok(files)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

const BEGIN: &str = "<!-- peers:";
const BEGUN: &str = " -->";
const END: &str = "<!-- /peers -->";

/// A page with all that is made in it made anew.
fn renew(page: &str, report: &Report) -> Result<String> {
    let mut parts = page.split(BEGIN);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = part.split_once(BEGUN).context("a mark of `peers` has no end")?;
        let (_, after) =
            rest.split_once(END).with_context(|| format!("{END} is missing after {name}"))?;
        text.push_str(&[BEGIN, name, BEGUN, &block(name, report)?, END, after].concat());
    }
    Ok(text)
}

fn block(name: &str, report: &Report) -> Result<String> {
    let own_lines = |text: String| format!("\n\n{text}\n\n");
    Ok(match name {
        "setting" => own_lines(table::setting(report)),
        "table" => own_lines(table::table(report)),
        "best" => own_lines(table::best_of_others(report)),
        "speed" => table::speed(report),
        "size" => table::size(report),
        other => bail!("{other} is none of setting, table, best, speed, size"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        serde_json::from_str(
            r#"{"host":{"cpus":2,"memory_mib":1,"kernel":"k"},"corpus_files":3,"logical_bytes":1,
            "data_bytes":1,"blocks_per_file":1,"load_averages":["1 2"],"programs":[]}"#,
        )
        .unwrap()
    }

    #[test]
    fn only_what_is_marked_is_renewed() {
        let page = "a <!-- peers:size -->old<!-- /peers --> b\n<!-- peers:speed --><!-- /peers -->";
        let once = renew(page, &report()).unwrap();
        assert!(once.starts_with("a <!-- peers:size -->- of the bytes"), "{once}");
        assert!(once.contains("--> b\n<!-- peers:speed -->- and -"), "{once}");
        assert_eq!(renew(&once, &report()).unwrap(), once);
        assert_eq!(renew("no marks", &report()).unwrap(), "no marks");
    }

    #[test]
    fn a_bad_mark_is_refused() {
        assert!(renew("<!-- peers:size -->", &report()).is_err());
        assert!(renew("<!-- peers:other --><!-- /peers -->", &report()).is_err());
    }
}
