//! Requests that concern only the store.

use std::fs::File;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use coppice_engine::{
    CheckReport, CheckScope, Damage, DiskFormat, Entry, ErrorKind, ImageRef, ImportKind,
    ImportOptions, Role,
};

use super::launch::find_image;
use super::machine::lock;
use super::{Supervisor, piped};
use crate::rpc::{
    Checked, ImageLine, ImportFormat, Imported, MachineShape, Part, Problem, Progress, Reply,
    Scope, Shown, SnapshotLine, StoreStats,
};

/// The longest byte string that is read whole, such as a machine's state.
const BLOB_MAX: u64 = 256 << 20;

impl Supervisor {
    /// Brings a disk or a byte stream into the store.
    pub(crate) fn import(
        &self,
        name: &str,
        (stream, format): (bool, ImportFormat),
        files: &[File],
        caller_left: &dyn Fn() -> bool,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Reply> {
        let (input, backing) = files.split_first().context("expected a file to import")?;
        let name = self.free_name(name)?;
        let mut step = |step: coppice_engine::Progress| {
            report(Progress { new_bytes: Some(step.new_bytes), ..bytes_step("importing", step) });
        };
        if backing.is_empty() && format != ImportFormat::Qcow2 && piped::is_pipe(input)? {
            let done = piped::import(&self.store, input, (name, stream), caller_left, &mut step)?;
            return Ok(Reply::Imported(done));
        }
        let kind = if stream { ImportKind::Stream } else { ImportKind::Disk };
        let format = match format {
            ImportFormat::Auto => DiskFormat::Auto,
            ImportFormat::Raw => DiskFormat::Raw,
            ImportFormat::Qcow2 => DiskFormat::Qcow2,
        };
        let options = ImportOptions { kind, format, ..ImportOptions::default() };
        let done = self.store.import_over(input, backing, name, options, &mut step)?;
        Ok(Reply::Imported(Imported {
            name: done.name.to_string(),
            id: done.id.to_string(),
            root: done.root.to_string(),
            logical_bytes: done.logical_bytes,
            new_bytes: done.new_bytes,
            stored_bytes: done.stored_bytes,
            seconds: done.seconds,
        }))
    }

    /// The image of a snapshot that a part names.
    pub(crate) fn image_of(&self, name: &str, part: Part) -> Result<ImageRef> {
        choose(&self.find(name)?, part)
            .with_context(|| format!("{name} has no such part: `coppice show {name}` lists them"))
    }

    /// Writes an image out again.
    pub(crate) fn export(
        &self,
        name: &str,
        (part, in_order): (Part, bool),
        out: &File,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Reply> {
        let begun = Instant::now();
        let image = self.image_of(name, part)?;
        let mut step = |step| report(bytes_step("exporting", step));
        if in_order {
            self.store.export_to(&image, &mut &*out, &mut step)?;
        } else {
            self.store.export(&image, out, &mut step)?;
        }
        Ok(Reply::Exported { bytes: image.len, seconds: begun.elapsed().as_secs_f64() })
    }

    /// The catalog.
    pub(crate) fn snapshots(&self) -> Result<Vec<SnapshotLine>> {
        Ok(self.store.snapshots().iter().flat_map(lines).collect())
    }

    /// One snapshot.
    pub(crate) fn show(&self, name: &str) -> Result<Shown> {
        let entry = self.find(name)?;
        let images = entry
            .record
            .images
            .iter()
            .map(|(role, image)| {
                Ok(ImageLine {
                    part: part_name(*role, kind(&entry)),
                    root: image.root.to_string(),
                    logical_bytes: image.len,
                    data_bytes: self.store.data_bytes(image)?,
                })
            })
            .collect::<Result<_>>()?;
        let machine = match kind(&entry) {
            "machine" | "cold" => {
                let recorded = super::config::decode(&entry.record.config)?;
                let config = recorded.machine;
                Some(MachineShape {
                    memory_bytes: config.memory_bytes,
                    vcpus: config.vcpus,
                    disks: config.disks.iter().map(|disk| disk.len).collect(),
                    nets: recorded.nets,
                    cmdline: recorded.cmdline,
                })
            }
            _ => None,
        };
        let names = entry.names.iter().map(ToString::to_string).collect();
        let snapshot = line(&entry, name.to_owned());
        Ok(Shown { snapshot, names, images, machine })
    }

    /// Gives a snapshot another name.
    pub(crate) fn tag(&self, name: &str, new: &str) -> Result<Reply> {
        let id = self.find(name)?.id;
        let new = self.free_name(new)?;
        self.store.tag(&id.to_string(), new)?;
        Ok(Reply::Done)
    }

    /// Takes a name out of the catalog.
    pub(crate) fn remove_snapshot(&self, name: &str) -> Result<Reply> {
        let _alone = lock(&self.removing);
        let entry = self.find(name)?;
        self.check_unneeded(&entry).with_context(|| format!("cannot remove {name}"))?;
        self.store.remove(name)?;
        self.forget_fallback(&entry);
        self.working_sets.keep_only(&self.store);
        Ok(Reply::Done)
    }

    /// The store's totals.
    pub(crate) fn stats(&self) -> Result<StoreStats> {
        let stats = self.store.stats();
        Ok(StoreStats {
            logical_bytes: stats.logical_bytes,
            unique_bytes: stats.unique_bytes,
            stored_bytes: stats.stored_bytes,
            chunks: stats.chunks,
            packs: stats.packs,
            snapshots: stats.snapshots,
            kept_twice_bytes: self.store.kept_twice_when_counted()?,
        })
    }

    /// Reads and verifies everything, or some.
    pub(crate) fn check(&self, scope: Scope, report: &mut dyn FnMut(Progress)) -> Result<Checked> {
        let begun = Instant::now();
        let wanted = match scope {
            Scope::Full => CheckScope::Full,
            Scope::Structure => CheckScope::Structure,
            Scope::Sample { percent, seed } => CheckScope::Sample { percent, seed },
        };
        let mut progress = |step| report(bytes_step("checking", step));
        let found = self.store.check_some(wanted, &mut progress)?;
        Ok(checked(&found, scope, begun.elapsed().as_secs_f64()))
    }

    /// Puts damaged packs aside, and verifies everything again.
    pub(crate) fn repair(&self, report: &mut dyn FnMut(Progress)) -> Result<Checked> {
        let begun = Instant::now();
        let (repaired, left) =
            self.store.repair(&mut |step| report(bytes_step("repairing", step)))?;
        let checked = checked(&left, Scope::Full, begun.elapsed().as_secs_f64());
        Ok(Checked { repaired: Some(repaired), ..checked })
    }

    /// A byte string that was stored with `Session::blob`.
    pub(crate) fn read_blob(&self, image: &ImageRef) -> Result<Vec<u8>> {
        if image.len > BLOB_MAX {
            bail!("the machine state is {} bytes long, which cannot be right", image.len);
        }
        let mut bytes = vec![0; usize::try_from(image.len)?];
        let got = self.store.reader(image)?.read_at(0, &mut bytes)?;
        if got != bytes.len() {
            bail!("the machine state ends after {got} of {} bytes", bytes.len());
        }
        Ok(bytes)
    }

    pub(super) fn find(&self, name: &str) -> Result<Entry> {
        self.store.lookup(name).map_err(|error| {
            if error.kind() == ErrorKind::NotFound {
                anyhow::anyhow!("there is no snapshot named {name}: `coppice snapshots` lists them")
            } else {
                error.into()
            }
        })
    }
}

fn bytes_step(what: &str, step: coppice_engine::Progress) -> Progress {
    Progress {
        what: what.to_owned(),
        done: step.done,
        total: step.total.unwrap_or(0),
        bytes: true,
        new_bytes: None,
    }
}

fn checked(found: &CheckReport, scope: Scope, seconds: f64) -> Checked {
    Checked {
        ok: found.is_clean(),
        scope,
        packs: found.packs,
        chunks: found.chunks,
        skipped_frames: found.skipped_frames,
        bytes: found.bytes,
        seconds,
        problems: found
            .damages
            .iter()
            .map(|damage| Problem {
                what: damage_line(damage),
                snapshots: damage.snapshots.iter().cloned().collect(),
            })
            .collect(),
        healed_frames: found.healed_frames,
        repaired: None,
    }
}

fn damage_line(damage: &Damage) -> String {
    let mut line = match (damage.pack, damage.offset) {
        (Some(pack), Some(offset)) => format!("pack {pack} at byte {offset}: {}", damage.problem),
        (Some(pack), None) => format!("pack {pack}: {}", damage.problem),
        _ => damage.problem.clone(),
    };
    if !damage.objects.is_empty() {
        let objects: Vec<&str> = damage.objects.iter().map(String::as_str).collect();
        line.push_str(&format!("; chunk {}", objects.join(", ")));
    }
    line
}

fn choose(entry: &Entry, part: Part) -> Option<ImageRef> {
    match part {
        Part::Memory => find_image(entry, Role::Memory),
        Part::Disk(index) => find_image(entry, Role::Disk(index)),
        Part::Kernel if kind(entry) == "stream" => None,
        Part::Kernel => find_image(entry, Role::Stream),
        // The stream of what has disks is their kernel.
        Part::Main => find_image(entry, Role::Disk(0)).or_else(|| find_image(entry, Role::Stream)),
    }
}

pub(super) fn kind(entry: &Entry) -> &'static str {
    let has = |role| find_image(entry, role).is_some();
    match (has(Role::Memory), has(Role::Disk(0)), has(Role::Stream)) {
        (true, _, _) => "machine",
        (false, true, true) => "cold",
        (false, false, true) => "stream",
        (false, _, false) => "disk",
    }
}

/// What a part of a snapshot of this kind is called.
pub(super) fn part_name(role: Role, kind: &str) -> String {
    match role {
        Role::Memory => "memory".to_owned(),
        Role::Disk(index) => format!("disk{index}"),
        Role::State => "state".to_owned(),
        Role::Stream if kind == "stream" => "stream".to_owned(),
        Role::Stream => "kernel".to_owned(),
    }
}

/// One line for each name; a snapshot without a name is listed by its id.
fn lines(entry: &Entry) -> Vec<SnapshotLine> {
    if entry.names.is_empty() {
        return vec![line(entry, entry.id.to_string())];
    }
    entry.names.iter().map(|name| line(entry, name.to_string())).collect()
}

fn line(entry: &Entry, name: String) -> SnapshotLine {
    SnapshotLine {
        name,
        id: entry.id.to_string(),
        kind: kind(entry).to_owned(),
        logical_bytes: entry.record.images.iter().map(|(_, image)| image.len).sum(),
        stored_bytes: entry.stored_bytes,
        created_unix_ms: entry.created_unix_ms,
        parent: entry.record.parent.map(|id| id.to_string()),
    }
}
