//! The programs that are compared, as shell commands. Every store is the
//! folder `store`, and everything is extracted into `out`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::blocks::{BLOCK, Drawn};
use crate::checkout::Checkout;
use crate::process::{first_line, in_path};

/// One program and how it is used. `{name}`, `{file}` and `{base}` stand for
/// the name of a snapshot, a file, and the last part of its path.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) version: String,
    /// Which compression it was told to use.
    pub(super) compression: String,
    pub(super) environment: Vec<(String, String)>,
    pub(super) init: String,
    before: String,
    after: &'static str,
    ingest: String,
    extract: &'static str,
    delete: &'static str,
    collect: &'static str,
    /// Whether it makes the whole path of a file below `out`.
    whole_path: bool,
    read: Read,
}

/// How blocks of a file are read without extracting it. `{blocks}` stands for
/// `OFFSET:LENGTH` of each, `{ranges}` for `FIRST-LAST,`.
#[derive(Debug)]
struct Read {
    /// Before all files, and behind them.
    begin: &'static str,
    /// Of one file, to standard output; empty if the program cannot.
    each: &'static str,
    end: &'static str,
}

/// Waits for what the last program in the background does, unless it ends.
const READY: &str = "ready() { until \"$@\"; do kill -0 $!; sleep 0.01; done; }";

/// casync gives a device of a single file by NBD only, and mounts only trees.
const CANNOT_READ: Read = Read { begin: "", each: "", end: "" };

impl Program {
    fn script(&self, each: &str, prefix: &str, files: &[&PathBuf], last: &str) -> String {
        let mut script = format!("{READY}\n{}\n", self.before);
        for file in files {
            script.push_str(&self.script_line(each, prefix, file));
            script.push('\n');
        }
        script + last + "\n" + self.after
    }

    fn script_line(&self, each: &str, prefix: &str, file: &Path) -> String {
        let base = base(file);
        each.replace("{name}", &format!("{prefix}{}", base.replace('.', "-")))
            .replace("{file}", &file.display().to_string())
            .replace("{base}", &base)
    }

    pub(super) fn ingest(&self, prefix: &str, files: &[&PathBuf]) -> String {
        self.script(&self.ingest, prefix, files, "")
    }

    /// Reads blocks of all files into the file `blocks`; `None` if it cannot.
    pub(super) fn read(&self, drawn: &Drawn) -> Option<String> {
        if self.read.each.is_empty() {
            return None;
        }
        let mut script = format!("{READY}\n{}\n{}\n{{\n", self.before, self.read.begin);
        for (file, offsets) in drawn {
            let blocks: Vec<String> = offsets.iter().map(|at| format!("{at}:{BLOCK}")).collect();
            let curl = |at: &u64| {
                format!(
                    "url = \"$URL\"\nrange = {at}-{}\nheader = \"Connection: close\"\noutput = -",
                    at + BLOCK - 1
                )
            };
            let curl: Vec<String> = offsets.iter().map(curl).collect();
            let line = self.script_line(self.read.each, "", file);
            let line = line.replace("{blocks}", &blocks.join(" "));
            script.push_str(&line.replace("{curl}", &curl.join("\nnext\n")));
            script.push('\n');
        }
        Some(format!("{script}}} > blocks\n{}\n{}", self.read.end, self.after))
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
const PACKAGES: [&str; 6] = ["time", "restic", "borgbackup", "casync", "fuse", "curl"];

/// The wanted programs that this machine has or can get.
pub(super) fn find(checkout: &Checkout, names: &[String], level: u8) -> Result<Vec<Program>> {
    if level != ONLY_LEVEL {
        eprintln!(
            "xtask: restic and casync compress at zstd level {ONLY_LEVEL}, whatever they are told"
        );
    }
    crate::setup::install(&PACKAGES)?;
    let mut programs = Vec::new();
    for full_name in names {
        let (name, level) = match full_name.split_once('@') {
            Some((name, own)) => (name, own.parse().context("NAME@LEVEL needs a zstd level")?),
            None => (full_name.as_str(), level),
        };
        let program = match name {
            "coppice" => coppice(&crate::story::build_binary(checkout)?, level)?,
            "restic" => restic()?,
            "borg" => borg(level)?,
            "casync" => casync()?,
            "rustic" if in_path("rustic").is_none() => {
                eprintln!("xtask: rustic is left out: `cargo install rustic-rs` brings it");
                continue;
            }
            "rustic" => rustic(level)?,
            other => bail!("{other} is none of coppice, restic, borg, casync, rustic"),
        };
        programs.push(Program { name: full_name.clone(), ..program });
    }
    Ok(programs)
}

/// What restic's "auto" and casync's default mean; neither can be told another.
const ONLY_LEVEL: u8 = 3;

/// This program, which reads blocks of what others have mounted.
fn own_program() -> Result<String> {
    Ok(std::env::current_exe()?.display().to_string())
}

fn version(program: &str, argument: &str) -> Result<String> {
    first_line(Command::new(program).arg(argument))
}

fn environment(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Its service is part of what is measured, from start to end.
fn coppice(binary: &Path, level: u8) -> Result<Program> {
    let program = binary.display().to_string();
    Ok(Program {
        name: "coppice".to_owned(),
        version: version(&program, "--version")?,
        compression: format!("zstd {level}"),
        environment: environment(&[("COPPICE", &program), ("COPPICE_HOME", "store")]),
        init: "\"$COPPICE\" stats; \"$COPPICE\" serve --stop".to_owned(),
        before: format!(
            "\"$COPPICE\" serve --zstd-level {level} & ready [ -S store/run/supervisor.sock ]"
        ),
        after: "\"$COPPICE\" serve --stop; wait",
        ingest: "\"$COPPICE\" import '{file}' --name {name}".to_owned(),
        extract: "\"$COPPICE\" export {name} 'out/{base}'",
        delete: "\"$COPPICE\" rmi {name}",
        collect: "\"$COPPICE\" gc",
        whole_path: false,
        read: Read { begin: "", each: "\"$COPPICE\" read {name} {blocks}", end: "" },
    })
}

fn restic() -> Result<Program> {
    Ok(Program {
        name: "restic".to_owned(),
        version: version("restic", "version")?,
        compression: format!("auto (zstd {ONLY_LEVEL})"),
        environment: environment(&[
            ("RESTIC_PASSWORD", "x"),
            ("RESTIC_REPOSITORY", "store"),
            ("RESTIC_CACHE_DIR", "cache"),
            ("XTASK", &own_program()?),
        ]),
        init: "restic init --repository-version 2".to_owned(),
        before: String::new(),
        after: "",
        ingest: "restic backup --quiet --compression auto --force --tag {name} '{file}'".to_owned(),
        extract: "restic restore latest --quiet --tag {name} --target out",
        delete: "restic forget --quiet $(restic snapshots --tag {name} --json | grep -o '\"short_id\":\"[0-9a-f]*' | cut -d'\"' -f4)",
        collect: "restic prune --quiet --max-unused 25%",
        whole_path: true,
        read: Read {
            begin: "mkdir -p mount; restic mount mount > /dev/null & ready mountpoint -q mount",
            each: "\"$XTASK\" read-blocks \"mount/tags/{name}/latest{file}\" {blocks}",
            end: "fusermount -u mount; wait",
        },
    })
}

fn borg(level: u8) -> Result<Program> {
    Ok(Program {
        name: "borg".to_owned(),
        version: version("borg", "--version")?,
        compression: format!("zstd {level}"),
        environment: environment(&[
            ("XTASK", &own_program()?),
            ("BORG_BASE_DIR", "base"),
            ("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes"),
            ("BORG_DELETE_I_KNOW_WHAT_I_AM_DOING", "YES"),
        ]),
        init: "borg init -e none store".to_owned(),
        before: String::new(),
        after: "",
        ingest: format!(
            "borg create --compression zstd,{level} --files-cache disabled store::{{name}} '{{file}}'"
        ),
        extract: "(cd out && BORG_BASE_DIR=../base borg extract --sparse ../store::{name})",
        delete: "borg delete store::{name}",
        collect: "borg compact store",
        whole_path: true,
        read: Read {
            begin: "mkdir -p mount; borg mount -f store mount & ready mountpoint -q mount",
            each: "\"$XTASK\" read-blocks \"mount/{name}{file}\" {blocks}",
            end: "fusermount -u mount; wait",
        },
    })
}

fn casync() -> Result<Program> {
    Ok(Program {
        name: "casync".to_owned(),
        version: version("casync", "--version")?,
        compression: format!("zstd {ONLY_LEVEL}"),
        environment: Vec::new(),
        init: "mkdir -p store".to_owned(),
        before: String::new(),
        after: "",
        ingest: "casync make --compression=zstd --store=store/chunks.castr store/{name}.caibx '{file}' > /dev/null".to_owned(),
        extract: "casync extract --store=store/chunks.castr store/{name}.caibx 'out/{base}'",
        delete: "rm store/{name}.caibx",
        collect: "casync gc --store=store/chunks.castr store/*.caibx",
        whole_path: false,
        read: CANNOT_READ,
    })
}

fn rustic(level: u8) -> Result<Program> {
    Ok(Program {
        name: "rustic".to_owned(),
        version: version("rustic", "--version")?,
        compression: format!("zstd {level}"),
        environment: environment(&[
            ("RUSTIC_PASSWORD", "x"),
            ("RUSTIC_REPOSITORY", "store"),
            ("RUSTIC_CACHE_DIR", "cache"),
            ("RUSTIC_NO_PROGRESS", "true"),
        ]),
        init: format!("rustic init --set-compression {level}"),
        before: String::new(),
        after: "",
        ingest: "rustic backup --force --tag {name} '{file}'".to_owned(),
        extract: "rustic restore --filter-tags {name} 'latest:{file}' 'out/{base}'",
        delete: "rustic forget --filter-tags {name} --keep-none",
        collect: "rustic prune --instant-delete --max-unused 25%",
        whole_path: false,
        // It mounts nothing, but serves files; one `curl` asks for all blocks of one. On a
        // connection that is kept, each answer waits 43 ms for a delayed acknowledgement, which
        // says nothing of rustic: each block gets a connection of its own (0.7 ms).
        read: Read {
            begin: "rustic webdav --address 127.0.0.1:28123 --path-template '{tags}' & server=$!; ready curl -s -o /dev/null http://127.0.0.1:28123/",
            each: "URL=\"http://127.0.0.1:28123/{name}{file}\"; curl -s --fail -K - <<END\n{curl}\nEND",
            end: "kill $server; wait $server || true",
        },
    })
}
