//! `coppice cp`: trees into and out of machines.

use std::path::Path;

use anyhow::Result;

use super::exec::agent;
use crate::WrongUsage;
use crate::client::Client;

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Host(&'a Path),
    Machine { name: &'a str, path: &'a Path },
}

impl<'a> Place<'a> {
    /// `NAME:PATH` is in a machine; a host path with a colon in its first
    /// component is written with a leading `./`.
    fn parse(text: &'a str) -> Self {
        match text.split_once(':') {
            Some((name, path)) if !name.is_empty() && !name.contains('/') && !path.is_empty() => {
                Self::Machine { name, path: Path::new(path) }
            }
            _ => Self::Host(Path::new(text)),
        }
    }
}

pub(super) fn cp(client: &Client, source: &str, target: &str) -> Result<()> {
    let report = match (Place::parse(source), Place::parse(target)) {
        (Place::Host(from), Place::Machine { name, path }) => {
            agent(client, name)?.put(from, path)?
        }
        (Place::Machine { name, path }, Place::Host(to)) => agent(client, name)?.get(path, to)?,
        _ => {
            let usage = "one side must be MACHINE:PATH and the other a path on this host";
            return Err(WrongUsage(usage).into());
        }
    };
    if report.skipped > 0 {
        eprintln!("coppice: {} sockets, devices or pipes were not copied", report.skipped);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_names_a_machine_unless_it_is_in_a_path() {
        let inside = Place::Machine { name: "vm", path: Path::new("/root") };
        assert_eq!(Place::parse("vm:/root"), inside);
        assert_eq!(Place::parse("./a:b"), Place::Host(Path::new("./a:b")));
        assert_eq!(Place::parse("/tmp/a:b"), Place::Host(Path::new("/tmp/a:b")));
        assert_eq!(Place::parse("vm:"), Place::Host(Path::new("vm:")));
    }
}
