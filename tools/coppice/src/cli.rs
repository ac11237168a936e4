//! The command line.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use coppice_engine::Settings;

use crate::cable::Cable;
use crate::rpc::{ImportFormat, ReadExtent};
use crate::supervisor::{FORKS, MEMORY_MIB, VCPUS};

/// Capture running Linux machines whole - memory, disks and CPU - and regrow
/// them in milliseconds as any number of forks that share what they have not
/// changed.
#[derive(Debug, Parser)]
#[command(name = "coppice", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    /// The folder of the store [default: $COPPICE_HOME, else the XDG data
    /// folder]
    #[arg(long, global = true, value_name = "DIR", env = "COPPICE_HOME", hide_env = true)]
    pub(crate) store: Option<PathBuf>,

    /// Print one JSON document instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Look at the store without owning it: it may lie on read-only media or
    /// belong to another process. For export, snapshots, show, diff, tree,
    /// stats and check
    #[arg(long, global = true)]
    pub(crate) read_only: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Bring a disk image or any byte stream into the store
    Import(Import),
    /// Write an image out again, byte for byte
    Export(Export),
    /// Write some bytes of an image to standard output
    Read(Read),
    /// List everything in the store
    Snapshots,
    /// Show what a snapshot holds
    Show {
        /// Name, id, or the beginning of an id
        name: String,
        /// Also what it shares with others, and what removing it would free
        #[arg(long)]
        usage: bool,
    },
    /// Show where two snapshots differ
    Diff {
        one: String,
        other: String,
        /// List every extent, not only the first of each part
        #[arg(long)]
        all: bool,
    },
    /// Draw which snapshot was made from which
    Tree {
        /// Also what nothing else needs of each, and what removing it would free
        #[arg(long)]
        usage: bool,
    },
    /// Give a snapshot another name
    Tag { name: String, new: String },
    /// Remove a snapshot's name; machines made from it are left alone
    Rmi {
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Show how many bytes the store keeps, and for how much data
    Stats {
        /// Also where the bytes are, and how many are dead: reads all trees
        #[arg(long)]
        usage: bool,
    },
    /// Read and verify every byte of the store, or some
    Check(Check),
    /// Throw the index away and build it again from the packs
    RebuildIndex,
    /// Free what no snapshot and no machine needs, beside everything else
    Gc(Gc),
    /// Start a machine: boot a kernel, or continue from a snapshot
    Run(Run),
    /// Run a command in a machine
    Exec(Exec),
    /// Copy files into or out of a machine (MACHINE:PATH names a place in it)
    Cp { source: String, target: String },
    /// Capture a machine whole into the store; it goes on running
    Snapshot {
        machine: String,
        /// Name of the snapshot [default: none, it is known by its id]
        #[arg(long)]
        name: Option<String>,
        /// Capture only the disks and what boots them: as after a power cut,
        /// with the guest's page cache flushed if its agent answers
        #[arg(long)]
        cold: bool,
    },
    /// Regrow a machine or a snapshot as new machines that continue from it
    Fork(Fork),
    /// List machines
    Ps,
    /// Print what a machine wrote to its console
    Logs {
        machine: String,
        /// Go on printing until the machine ends
        #[arg(short, long)]
        follow: bool,
    },
    /// Take a machine off the host with its memory kept: all of it goes into the
    /// store, and its process ends
    Pause {
        machine: String,
        /// Only stop its CPUs, and keep all of it on the host
        #[arg(long)]
        in_memory: bool,
    },
    /// Let a paused machine go on
    Resume { machine: String },
    /// Boot a machine that was shut down again, from its own disks
    Start { machine: String },
    /// Shut machines down; their disks are kept until they are removed
    Stop {
        #[arg(required = true)]
        machines: Vec<String>,
        /// End them without asking the guest, and lose what they have written
        #[arg(long)]
        kill: bool,
    },
    /// Remove machines
    Rm {
        #[arg(required = true)]
        machines: Vec<String>,
        /// Also those that run
        #[arg(short, long)]
        force: bool,
    },
    /// Run the supervisor that owns the store and its machines
    Serve(Serve),
    /// Check whether this host can run machines, and say what to change
    Doctor,
    /// Print the completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write manual pages into a folder
    Man {
        /// The folder, such as /usr/local/share/man/man1
        folder: PathBuf,
    },
    /// Tell and check the whole story on this host: boot, capture, a hundred
    /// forks
    Demo(Demo),
    /// Write a paused machine's memory to a file, for inspection
    #[command(hide = true)]
    DumpMemory { machine: String, file: PathBuf },
    /// Show the page server's pools
    #[command(hide = true)]
    Pools,
    #[command(hide = true)]
    InternalZygote,
    #[command(hide = true)]
    InternalPager,
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// A raw or qcow2 disk image, or any file; `-` is standard input
    pub(crate) file: PathBuf,
    /// What to call it
    #[arg(long)]
    pub(crate) name: String,
    /// How to read the file
    #[arg(long = "as", value_enum, default_value_t = ImportAs::Disk)]
    pub(crate) kind: ImportAs,
    /// How a disk lies in the file
    #[arg(long, value_enum, default_value_t = ImportFormat::Auto)]
    pub(crate) format: ImportFormat,
    /// The file that a qcow2 disk is written over; once more for the file that
    /// this one is written over, and so on
    #[arg(long, value_name = "PATH")]
    pub(crate) backing: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ImportAs {
    /// A disk that machines can start from
    Disk,
    /// Any bytes, cut by content: an insertion moves nothing; no machine can
    /// use them
    Stream,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Check everything but the pages themselves
    #[arg(long)]
    pub(crate) structure: bool,
    /// Check everything, but of the pages only this share, drawn at random
    #[arg(long, value_name = "PERCENT", conflicts_with = "structure", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) sample: Option<u8>,
    /// Put damaged packs aside, keep what is sound in them, and say what is
    /// lost
    #[arg(long, conflicts_with_all = ["structure", "sample"])]
    pub(crate) repair: bool,
    /// Draw the same pages as the check that named this seed
    #[arg(long, value_name = "N", requires = "sample")]
    pub(crate) seed: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Gc {
    /// Only say what would be freed and rewritten
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Rewrite a pack when at least this share of it is dead; one that is
    /// dead whole always goes
    #[arg(long, value_name = "PERCENT", default_value_t = 25, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) min_dead: u8,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Name or id of the snapshot
    pub(crate) name: String,
    /// Where to write; must not exist; `-` is standard output
    pub(crate) file: PathBuf,
    /// Export the guest memory of a machine snapshot
    #[arg(long, conflicts_with = "disk")]
    pub(crate) memory: bool,
    /// Export the kernel that a machine was booted with
    #[arg(long, conflicts_with_all = ["disk", "memory"])]
    pub(crate) kernel: bool,
    /// Export this disk of a machine snapshot
    #[arg(long, value_name = "N")]
    pub(crate) disk: Option<u16>,
}

#[derive(Debug, Args)]
pub(crate) struct Read {
    /// Name or id of the snapshot
    pub(crate) name: String,
    /// Where from and how much, in bytes; several are written one after the
    /// other
    #[arg(required = true, value_name = "OFFSET:LENGTH", value_parser = extent)]
    pub(crate) extents: Vec<ReadExtent>,
    /// Read the guest memory of a machine snapshot
    #[arg(long, conflicts_with = "disk")]
    pub(crate) memory: bool,
    /// Read this disk of a machine snapshot
    #[arg(long, value_name = "N")]
    pub(crate) disk: Option<u16>,
}

fn extent(text: &str) -> Result<ReadExtent, String> {
    let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is no number of bytes"));
    let (offset, length) = text.split_once(':').ok_or("give it as OFFSET:LENGTH")?;
    Ok(ReadExtent { offset: number(offset)?, length: number(length)? })
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Continue from this snapshot instead of booting; a cold one boots anew,
    /// with its own kernel
    #[arg(conflicts_with_all = ["kernel", "disks", "memory", "cpus", "cmdline"], required_unless_present = "kernel")]
    pub(crate) snapshot: Option<String>,
    /// Name of the machine
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Linux kernel to boot: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// An imported disk; the first is /dev/vda, the next /dev/vdb
    #[arg(long = "disk", value_name = "NAME")]
    pub(crate) disks: Vec<String>,
    /// Guest memory
    #[arg(long, value_name = "MiB", default_value_t = 256, value_parser = RangedU64ValueParser::<u64>::new().range(MEMORY_MIB))]
    pub(crate) memory: u64,
    /// Number of CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<u32>::new().range(VCPUS))]
    pub(crate) cpus: u32,
    /// Kernel command line to use instead of the usual one
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// Add a network device: `bridge:NAME` connects it to a bridge of the host,
    /// `tap` makes a tap device that you connect (`coppice ps --json` names
    /// it), `tap:NAME` takes one that exists. Once for each device
    #[arg(long = "net", value_name = "WHERE")]
    pub(crate) nets: Vec<Cable>,
    /// Leave the machine stopped before its first instruction
    #[arg(long, requires = "snapshot")]
    pub(crate) paused: bool,
    /// Fetch pages when they are touched, not what earlier machines of this
    /// snapshot touched
    #[arg(long, requires = "snapshot")]
    pub(crate) no_prefetch: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Use a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Pass standard input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    pub(crate) machine: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Fork {
    /// A machine, captured as it is now, or a snapshot
    pub(crate) source: String,
    /// How many
    #[arg(long, default_value_t = 1, value_parser = RangedU64ValueParser::<u32>::new().range(FORKS))]
    pub(crate) count: u32,
    /// Name of the fork, or the beginning of all their names
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Where each network device that the source has leads, as for `run`
    /// [default: the bridge that the machine is on, else a tap device each]
    #[arg(long = "net", value_name = "WHERE")]
    pub(crate) nets: Vec<Cable>,
    /// Leave them stopped before their first instruction
    #[arg(long)]
    pub(crate) paused: bool,
    /// Fetch pages when they are touched, not what earlier machines of this
    /// snapshot touched
    #[arg(long)]
    pub(crate) no_prefetch: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// End by itself when there is nothing to do
    #[arg(long, hide = true)]
    pub(crate) background: bool,
    /// End the supervisor that runs now, and with it every machine
    #[arg(long)]
    pub(crate) stop: bool,
    /// How hard to compress what is stored from now on
    #[arg(long, value_name = "LEVEL", default_value_t = Settings::default().zstd_level, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub(crate) zstd_level: i32,
    /// How much of the host's memory may hold pages that machines share and
    /// the store has [default: half of it; less while the host is short]
    #[arg(long, value_name = "MiB", env = "COPPICE_POOL_MEMORY", hide_env_values = true)]
    pub(crate) pool_memory: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Linux kernel to boot: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Raw root disk with Python 3 and the agent
    #[arg(long, value_name = "FILE")]
    pub(crate) disk: PathBuf,
    /// How many forks to grow
    #[arg(long, default_value_t = 100)]
    pub(crate) forks: u32,
    /// Guest memory
    #[arg(long, value_name = "MiB", default_value_t = 256)]
    pub(crate) memory: u64,
    /// Keep the store and the machines afterwards
    #[arg(long)]
    pub(crate) keep: bool,
}
