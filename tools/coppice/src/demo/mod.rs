//! The whole story on this host, each claim checked as it is told: boot a
//! machine, give it state that lives only in memory, capture it, regrow it,
//! let the forks diverge, capture one again, verify the store.

mod again;
mod claims;
mod grow;
mod guest;
mod report;
mod story;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::cli::Demo;
use crate::client::Client;
use crate::output::Output;
use report::{Check, Figures, Report};

/// Everything the story needs while it is told.
pub(super) struct Demonstration<'a> {
    options: &'a Demo,
    client: Client,
    checks: Vec<Check>,
    figures: Figures,
    begun: Instant,
    folder: PathBuf,
}

/// Tells the story in a store of its own, or in the one that was asked for.
pub(crate) fn run(options: &Demo, store: Option<PathBuf>, out: Output) -> Result<ExitCode> {
    let own = store.is_none();
    let folder = store.map_or_else(own_store, Ok)?;
    let mut demo = Demonstration {
        options,
        client: Client::new(folder.clone())?,
        checks: Vec::new(),
        figures: Figures { forks: options.forks, ..Figures::default() },
        begun: Instant::now(),
        folder: folder.clone(),
    };
    let told = demo.tell();
    let report = Report {
        ok: told.is_ok() && demo.checks.iter().all(|check| check.ok),
        checks: demo.checks,
        figures: demo.figures,
    };
    if told.is_ok() {
        out.print(&report, || report.text())?;
    }
    if options.keep {
        eprintln!("kept: look around with `coppice --store {} ps`", folder.display());
    } else {
        clean_up(&demo.client, own.then_some(folder))?;
    }
    told?;
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn own_store() -> Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("coppice-demo-{}", std::process::id()));
    std::fs::create_dir(&folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    Ok(folder)
}

fn clean_up(client: &Client, own: Option<PathBuf>) -> Result<()> {
    client.end_supervisor()?;
    match own {
        Some(folder) => std::fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot remove {}", folder.display())),
        None => Ok(()),
    }
}

impl Demonstration<'_> {
    /// Says what happens now, with the time since the beginning.
    fn say(&self, what: &str) {
        eprintln!("[{:7.2} s] {what}", self.begun.elapsed().as_secs_f64());
    }

    /// Records a claim.
    fn check(&mut self, name: &str, ok: bool, detail: String) {
        self.say(&format!("{} {name}: {detail}", if ok { "ok  " } else { "FAIL" }));
        self.checks.push(Check { name: name.to_owned(), ok, detail });
    }
}
