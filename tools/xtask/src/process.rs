//! Running other programs: quietly with a log, or with their own output.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::progress::{Task, Terminal};

/// Of a failed program's log, as much as fits a screen.
const LOG_LINES_SHOWN: usize = 40;

/// Runs a program whose output only matters if it fails.
pub(crate) fn run_logged(what: &str, mut command: Command, log: &Path) -> Result<()> {
    let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    let task = Task::begin(what, Terminal::Ours);
    let status = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot start {}", name(&command)))?;
    if !status.success() {
        drop(task);
        let text = std::fs::read(log).unwrap_or_default();
        eprintln!("{}", tail(&String::from_utf8_lossy(&text)));
        bail!(
            "{what}: {} ended with {status}; all it said is in {}",
            name(&command),
            log.display()
        );
    }
    task.done();
    Ok(())
}

/// Runs a program that shows its own progress on stderr. Its stdout goes to
/// our stderr, so that nothing but results is on ours.
pub(crate) fn run_shown(what: &str, mut command: Command) -> Result<()> {
    let task = Task::begin(what, Terminal::Theirs);
    let status = command
        .stdin(Stdio::null())
        .stdout(stderr_as_stdout()?)
        .status()
        .with_context(|| format!("cannot start {}", name(&command)))?;
    if !status.success() {
        bail!("{what}: {} ended with {status}", name(&command));
    }
    task.done();
    Ok(())
}

/// Runs a program and returns its first output line.
pub(crate) fn first_line(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", name(command)))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("{} ended with {}: {}", name(command), output.status, text.trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// Whether we may do anything on this machine.
pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// A command that runs as root: as it is, or by way of `sudo`.
pub(crate) fn as_root(program: &Path) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    let Some(sudo) = in_path("sudo") else {
        bail!("{} needs root: start this again as root, or install sudo", program.display());
    };
    let mut command = Command::new(sudo);
    command.arg(program);
    Ok(command)
}

/// Finds a program as a shell would, and where Debian keeps root's programs.
pub(crate) fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

fn stderr_as_stdout() -> Result<Stdio> {
    let owned = std::os::fd::AsFd::as_fd(&std::io::stderr()).try_clone_to_owned()?;
    Ok(Stdio::from(owned))
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_long_log_is_shown() {
        let text: String = (0..100).map(|line| format!("{line}\n")).collect();
        assert!(tail(&text).starts_with("60\n"));
        assert_eq!(tail("one"), "one");
    }

    #[test]
    fn a_program_that_fails_is_named() {
        let error = first_line(&mut Command::new("false")).unwrap_err();
        assert!(error.to_string().contains("false"), "{error}");
        assert_eq!(first_line(Command::new("echo").arg("a\nb")).unwrap(), "a");
    }
}
