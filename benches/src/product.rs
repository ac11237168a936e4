//! The product as its users have it: the binary, with a store of its own and
//! templates made of the kernel of this bench.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use coppice_engine::{CommitOptions, Role, Settings, SnapshotRecord, Store};
use serde_json::Value;
use tempfile::TempDir;

use crate::kernel::{self, DATA_PAGE, DATA_PAGES, MEMORY_MIB, ORDERS_PAGE, Orders};

/// How long a guest may take to say something.
const PATIENCE: Duration = Duration::from_secs(120);

/// The name of the snapshot that all templates are made of.
const SEED: &str = "seed";

/// The binary and a store in a temporary folder. Dropping it ends the
/// supervisor and its machines.
#[derive(Debug)]
pub struct Product {
    binary: PathBuf,
    folder: TempDir,
}

impl Product {
    /// A new store that holds a machine which waits for orders.
    pub fn new(binary: Option<PathBuf>) -> Result<Self> {
        let binary = match binary {
            Some(binary) => binary,
            None => std::env::current_exe()?.with_file_name("coppice"),
        };
        ensure!(
            binary.exists(),
            "there is no {}: `cargo build --release` makes it",
            binary.display()
        );
        let folder = tempfile::Builder::new().prefix("coppice-bench-").tempdir()?;
        let product = Self { binary, folder };
        product.make_seed()?;
        Ok(product)
    }

    fn make_seed(&self) -> Result<()> {
        let path = self.folder.path().join("kernel");
        std::fs::write(&path, kernel::elf(Orders::Wait))?;
        let path = path.to_str().context("the temporary folder has an odd name")?;
        let memory = MEMORY_MIB.to_string();
        self.json(&["run", "--kernel", path, "--memory", &memory, "--name", "first"])?;
        self.wait_for("first", |console| console.starts_with('R').then_some(()))?;
        self.json(&["snapshot", "first", "--name", SEED])?;
        self.run(&["rm", "--force", "first"])?;
        Ok(())
    }

    /// Makes a snapshot whose forks do what `orders` say. Ends all machines.
    pub fn make_template(&self, name: &str, orders: Orders) -> Result<()> {
        self.end()?;
        let store = Store::open(&self.store(), &Settings::default())?;
        let seed = store.lookup(SEED)?;
        let memory = *seed.record.image(Role::Memory).context("the memory of the seed")?;
        let mut session = store.begin()?;
        let mut writer = session.image(memory.len, Some(&memory))?;
        writer.write(ORDERS_PAGE, &orders.page())?;
        for page in DATA_PAGE..DATA_PAGE + DATA_PAGES {
            writer.write(page, &kernel::data_page(page))?;
        }
        let memory = writer.finish()?;
        let mut images = seed.record.images.clone();
        for (role, image) in &mut images {
            if *role == Role::Memory {
                *image = memory;
            }
        }
        let config = seed.record.config.clone();
        let record = SnapshotRecord { images, config, parent: Some(seed.id) };
        let options = CommitOptions { name: Some(name.parse()?), ..CommitOptions::default() };
        session.commit(&record, options)?;
        Ok(())
    }

    /// Runs a command that must succeed, and returns what it prints.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command().args(arguments).output()?;
        if !output.status.success() {
            bail!("coppice {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs a command that must succeed, and returns its document.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = vec!["--json"];
        all.extend(arguments);
        Ok(serde_json::from_str(&self.run(&all)?)?)
    }

    /// Forks, and returns the machines' names and what was measured.
    pub fn fork(&self, source: &str, count: u32) -> Result<Forked> {
        let forked = self.json(&["fork", source, "--count", &count.to_string()])?;
        let machines = forked["machines"].as_array().context("machines")?;
        let number = |value: &Value| value.as_u64().context("a number");
        Ok(Forked {
            names: machines.iter().filter_map(|m| Some(m["name"].as_str()?.to_owned())).collect(),
            ready_us: machines.iter().map(|m| number(&m["ready_us"])).collect::<Result<_>>()?,
            all_ready_us: number(&forked["all_ready_us"])?,
        })
    }

    /// Waits until a machine's console says what `heard` makes something of.
    pub fn wait_for<T>(&self, machine: &str, heard: impl Fn(&str) -> Option<T>) -> Result<T> {
        let begun = Instant::now();
        let path = self.machine(machine).join("console.log");
        loop {
            let console = std::fs::read(&path).unwrap_or_default();
            if let Some(heard) = heard(&String::from_utf8_lossy(&console)) {
                return Ok(heard);
            }
            ensure!(begun.elapsed() < PATIENCE, "{machine} says nothing");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends the supervisor and with it every machine.
    pub fn end(&self) -> Result<()> {
        self.run(&["serve", "--stop"]).map(drop)
    }

    /// The folder of a machine.
    fn machine(&self, name: &str) -> PathBuf {
        self.store().join("machines").join(name)
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// The path of the binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--store").arg(self.store()).stdin(Stdio::null());
        command
    }

    /// The processes of all machines, and those that serve them: the supervisor
    /// and the page server.
    pub fn processes(&self) -> Result<(Vec<u32>, [u32; 2])> {
        let machines = self.json(&["ps"])?;
        let pid = |value: &Value| u32::try_from(value["pid"].as_u64()?).ok();
        let machines: Option<Vec<u32>> =
            machines["machines"].as_array().context("machines")?.iter().map(pid).collect();
        let pager = pid(&self.json(&["pools"])?).context("the page server")?;
        let stat = std::fs::read_to_string(format!("/proc/{pager}/stat"))?;
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1));
        let supervisor = parent.context("the parent of the page server")?.parse()?;
        Ok((machines.context("a machine without a process")?, [supervisor, pager]))
    }

    /// Removes machines.
    pub fn remove(&self, machines: &[String]) -> Result<()> {
        let mut arguments = vec!["rm", "--force"];
        arguments.extend(machines.iter().map(String::as_str));
        self.run(&arguments).map(drop)
    }

    /// A file of the bench's own in the same folder.
    pub fn scratch(&self, name: &str) -> Result<File> {
        let mut options = File::options();
        let options = options.create(true).truncate(true).read(true).write(true);
        Ok(options.open(self.folder.path().join(name))?)
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // The folder is removed in any case.
        drop(self.end());
    }
}

/// What a fork reported.
#[derive(Debug)]
pub struct Forked {
    /// The machines.
    pub names: Vec<String>,
    /// Of each, from its turn until its vCPU ran.
    pub ready_us: Vec<u64>,
    /// From the request until the last one's vCPU ran.
    pub all_ready_us: u64,
}
