//! `coppice doctor`: whether this host can do what Coppice does, and what to
//! change where it cannot.

mod host;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use super::store::heading;
use crate::output::{Output, table};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// It works, with a loss.
    Warn,
    /// Machines, or the store, cannot work.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    /// What was found.
    detail: String,
    /// What to do about it.
    fix: Option<&'static str>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, state: State::Ok, detail: detail.into(), fix: None }
    }

    fn warn(name: &'static str, detail: impl Into<String>, fix: &'static str) -> Self {
        Self { name, state: State::Warn, detail: detail.into(), fix: Some(fix) }
    }

    fn fail(name: &'static str, detail: impl Into<String>, fix: &'static str) -> Self {
        Self { name, state: State::Fail, detail: detail.into(), fix: Some(fix) }
    }
}

/// `doctor --json`.
#[derive(Debug, Serialize)]
struct Findings {
    ok: bool,
    checks: Vec<Check>,
}

/// Looks at the host and at the place of the store; exit code 1 if something
/// cannot work.
pub(super) fn doctor(store: &Path, out: Output) -> Result<ExitCode> {
    let checks = host::examine(store);
    let ok = checks.iter().all(|check| check.state != State::Fail);
    let findings = Findings { ok, checks };
    out.print(&findings, || text(&findings))?;
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(findings: &Findings) -> String {
    let mut rows = vec![heading(&["STATE", "CHECK", "FOUND"])];
    for check in &findings.checks {
        let state = match check.state {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Fail => "FAIL",
        };
        rows.push(vec![state.to_owned(), check.name.to_owned(), check.detail.clone()]);
    }
    let mut text = table(&rows);
    for check in findings.checks.iter().filter(|check| check.state != State::Ok) {
        if let Some(fix) = check.fix {
            text.push_str(&format!("\n{}: {fix}", check.name));
        }
    }
    text
}
