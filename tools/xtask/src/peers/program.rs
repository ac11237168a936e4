//! The programs that are compared, as shell commands. Every store is the
//! folder `store`, and everything is extracted into `out`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::checkout::Checkout;
use crate::process::{first_line, in_path};

/// One program and how it is used. `{name}`, `{file}` and `{base}` stand for
/// the name of a snapshot, a file, and the last part of its path.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) version: String,
    /// Which compression it was told to use.
    pub(super) compression: &'static str,
    pub(super) environment: Vec<(String, String)>,
    pub(super) init: String,
    before: &'static str,
    after: &'static str,
    ingest: &'static str,
    extract: &'static str,
    delete: &'static str,
    collect: &'static str,
    /// Whether it makes the whole path of a file below `out`.
    whole_path: bool,
}

impl Program {
    fn script(&self, each: &str, prefix: &str, files: &[&PathBuf], last: &str) -> String {
        let mut script = format!("{}\n", self.before);
        for file in files {
            let base = base(file);
            let line = each
                .replace("{name}", &format!("{prefix}{}", base.replace('.', "-")))
                .replace("{file}", &file.display().to_string())
                .replace("{base}", &base);
            script.push_str(&line);
            script.push('\n');
        }
        script + last + "\n" + self.after
    }

    pub(super) fn ingest(&self, prefix: &str, files: &[&PathBuf]) -> String {
        self.script(self.ingest, prefix, files, "")
    }

    pub(super) fn extract(&self, files: &[&PathBuf]) -> String {
        self.script(self.extract, "", files, "")
    }

    /// Both snapshots of each file go.
    pub(super) fn delete(&self, files: &[&PathBuf]) -> String {
        let twice = format!("{}\n{}", self.delete, self.delete.replace("{name}", "again-{name}"));
        self.script(&twice, "", files, self.collect)
    }

    /// Where a file appears when it is extracted.
    pub(super) fn extracted(&self, out: &Path, file: &Path) -> PathBuf {
        if self.whole_path {
            out.join(file.strip_prefix("/").unwrap_or(file))
        } else {
            out.join(base(file))
        }
    }
}

fn base(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Debian's packages of the programs, and of what measures them.
const PACKAGES: [&str; 4] = ["time", "restic", "borgbackup", "casync"];

/// The wanted programs that this machine has or can get.
pub(super) fn find(checkout: &Checkout, names: &[String]) -> Result<Vec<Program>> {
    crate::setup::install(&PACKAGES)?;
    let mut programs = Vec::new();
    for name in names {
        match name.as_str() {
            "coppice" => programs.push(coppice(&crate::story::build_binary(checkout)?)?),
            "restic" => programs.push(restic()?),
            "borg" => programs.push(borg()?),
            "casync" => programs.push(casync()?),
            "rustic" if in_path("rustic").is_none() => {
                eprintln!("xtask: rustic is left out: `cargo install rustic-rs` brings it");
            }
            "rustic" => programs.push(rustic()?),
            other => bail!("{other} is none of coppice, restic, borg, casync, rustic"),
        }
    }
    Ok(programs)
}

fn version(program: &str, argument: &str) -> Result<String> {
    first_line(Command::new(program).arg(argument))
}

fn environment(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Its service is part of what is measured, from start to end.
fn coppice(binary: &Path) -> Result<Program> {
    let program = binary.display().to_string();
    Ok(Program {
        name: "coppice".to_owned(),
        version: version(&program, "--version")?,
        compression: "zstd 1",
        environment: environment(&[("COPPICE", &program), ("COPPICE_HOME", "store")]),
        init: "\"$COPPICE\" stats; \"$COPPICE\" serve --stop".to_owned(),
        before: "\"$COPPICE\" serve & until [ -S store/run/supervisor.sock ]; do sleep 0.01; done",
        after: "\"$COPPICE\" serve --stop; wait",
        ingest: "\"$COPPICE\" import '{file}' --name {name}",
        extract: "\"$COPPICE\" export {name} 'out/{base}'",
        delete: "\"$COPPICE\" rmi {name}",
        collect: "\"$COPPICE\" gc",
        whole_path: false,
    })
}

fn restic() -> Result<Program> {
    Ok(Program {
        name: "restic".to_owned(),
        version: version("restic", "version")?,
        compression: "auto (zstd, its default level)",
        environment: environment(&[
            ("RESTIC_PASSWORD", "x"),
            ("RESTIC_REPOSITORY", "store"),
            ("RESTIC_CACHE_DIR", "cache"),
        ]),
        init: "restic init --repository-version 2".to_owned(),
        before: "",
        after: "",
        ingest: "restic backup --quiet --compression auto --force --tag {name} '{file}'",
        extract: "restic restore latest --quiet --tag {name} --target out",
        delete: "restic forget --quiet $(restic snapshots --tag {name} --json | grep -o '\"short_id\":\"[0-9a-f]*' | cut -d'\"' -f4)",
        collect: "restic prune --quiet --max-unused 25%",
        whole_path: true,
    })
}

fn borg() -> Result<Program> {
    Ok(Program {
        name: "borg".to_owned(),
        version: version("borg", "--version")?,
        compression: "zstd 1",
        environment: environment(&[
            ("BORG_BASE_DIR", "base"),
            ("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes"),
            ("BORG_DELETE_I_KNOW_WHAT_I_AM_DOING", "YES"),
        ]),
        init: "borg init -e none store".to_owned(),
        before: "",
        after: "",
        ingest: "borg create --compression zstd,1 --files-cache disabled store::{name} '{file}'",
        extract: "(cd out && BORG_BASE_DIR=../base borg extract --sparse ../store::{name})",
        delete: "borg delete store::{name}",
        collect: "borg compact store",
        whole_path: true,
    })
}

fn casync() -> Result<Program> {
    Ok(Program {
        name: "casync".to_owned(),
        version: version("casync", "--version")?,
        compression: "zstd, its default level",
        environment: Vec::new(),
        init: "mkdir -p store".to_owned(),
        before: "",
        after: "",
        ingest: "casync make --compression=zstd --store=store/chunks.castr store/{name}.caibx '{file}' > /dev/null",
        extract: "casync extract --store=store/chunks.castr store/{name}.caibx 'out/{base}'",
        delete: "rm store/{name}.caibx",
        collect: "casync gc --store=store/chunks.castr store/*.caibx",
        whole_path: false,
    })
}

fn rustic() -> Result<Program> {
    Ok(Program {
        name: "rustic".to_owned(),
        version: version("rustic", "--version")?,
        compression: "zstd 1",
        environment: environment(&[
            ("RUSTIC_PASSWORD", "x"),
            ("RUSTIC_REPOSITORY", "store"),
            ("RUSTIC_CACHE_DIR", "cache"),
            ("RUSTIC_NO_PROGRESS", "true"),
        ]),
        init: "rustic init --set-compression 1".to_owned(),
        before: "",
        after: "",
        ingest: "rustic backup --force --tag {name} '{file}'",
        extract: "rustic restore --filter-tags {name} 'latest:{file}' 'out/{base}'",
        delete: "rustic forget --filter-tags {name} --keep-none",
        collect: "rustic prune --instant-delete --max-unused 25%",
        whole_path: false,
    })
}
