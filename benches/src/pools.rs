//! Page servers in processes of their own, each with pools of the same image.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use coppice_engine::{ImportOptions, IndexKind, PageMap, Role, Settings, Store};
use coppice_runtime::fault::{Settings as FaultSettings, serve_pages};
use coppice_runtime::host::{News, Pager};
use coppice_runtime::pager_main;
use coppice_runtime::protocol::{Content, MachineKey, PoolId, PoolStats, Region};

use crate::child::inherited_channel;
use crate::family::{Mapped, log, program};
use crate::library::{FileLibrary, MemoryLibrary};

/// Where a page server has its pages from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A store on disk.
    Store,
    /// Its own memory.
    Memory,
    /// The file of the image.
    File,
}

/// The life of a page server's process.
pub fn serve(origin: Origin) -> Result<()> {
    let channel = inherited_channel()?;
    match origin {
        Origin::Store => pager_main(channel)?,
        Origin::Memory => {
            serve_pages(&channel, Arc::new(MemoryLibrary), &FaultSettings::default())?;
        }
        Origin::File => serve_pages(&channel, Arc::new(FileLibrary), &FaultSettings::default())?,
    }
    Ok(())
}

/// A page server and one pool.
#[derive(Debug)]
pub struct Pool {
    pager: Pager,
    memory: OwnedFd,
    next_machine: std::cell::Cell<u64>,
}

const ID: PoolId = PoolId(1);

/// An image in a store.
#[derive(Debug)]
pub struct Stored {
    store: Store,
    map: PageMap,
    folder: PathBuf,
}

impl Stored {
    /// Imports an image into a new store in this folder.
    pub fn import(image: &File, folder: &Path) -> Result<Self> {
        let settings = Settings { index: IndexKind::Memory, ..Settings::default() };
        let store = Store::open(folder, &settings)?;
        let name = "bench".parse()?;
        store.import(image, name, ImportOptions::default(), &mut |_| {})?;
        let entry = store.lookup("bench")?;
        let disk = entry.record.images.iter().find(|(role, _)| matches!(role, Role::Disk(_)));
        let map = store.page_map(&disk.context("the imported image")?.1)?;
        Ok(Self { store, map, folder: folder.to_owned() })
    }

    /// An empty pool over it, of a page server of its own.
    pub fn open_pool(&self) -> Result<Pool> {
        let pager = start(Origin::Store)?;
        for pack in self.map.packs() {
            pager.add_pack(pack.0, self.store.pack_file(*pack)?.as_fd())?;
        }
        let memory = pager.open_pool(ID, memory_file(&self.map.to_bytes())?.as_fd())?;
        Ok(Pool { pager, memory, next_machine: 0.into() })
    }

    /// Has the kernel forget its packs.
    pub fn drop_from_cache(&self) -> Result<()> {
        crate::restores::drop_from_cache(&self.folder)
    }
}

impl Pool {
    /// A pool over the image, served out of memory.
    pub fn in_memory(image: &File) -> Result<Self> {
        let pager = start(Origin::Memory)?;
        let memory = pager.open_pool(ID, image.as_fd())?;
        Ok(Self { pager, memory, next_machine: 0.into() })
    }

    /// A pool over the image, served out of its file.
    pub fn in_file(image: &File) -> Result<Self> {
        let pager = start(Origin::File)?;
        let memory = pager.open_pool(ID, image.as_fd())?;
        Ok(Self { pager, memory, next_machine: 0.into() })
    }

    /// A pool over the image, imported into a new store in this folder.
    pub fn in_store(image: &File, folder: &Path) -> Result<Self> {
        Stored::import(image, folder)?.open_pool()
    }

    /// The memory that forks map.
    pub fn memory(&self) -> &OwnedFd {
        &self.memory
    }

    /// The page server that has it.
    pub fn pager(&self) -> &Pager {
        &self.pager
    }

    /// Has a fork's faults served.
    pub fn attach(&self, mapped: &Mapped) -> Result<MachineKey> {
        let machine = MachineKey(self.next_machine.get());
        self.next_machine.set(machine.0 + 1);
        let region = Region {
            content: Content::Memory,
            address: mapped.address,
            len: mapped.len,
            offset: 0,
            pooled: true,
        };
        let userfault = mapped.userfault.as_ref().context("a pooled fork has a userfaultfd")?;
        self.pager.attach(machine, vec![(ID, region)], userfault)?;
        Ok(machine)
    }

    /// The pool's counters.
    pub fn stats(&self) -> Result<PoolStats> {
        let (pools, _) = self.pager.stats()?;
        Ok(pools.first().context("the pool")?.1)
    }
}

fn start(origin: Origin) -> Result<Pager> {
    let role = match origin {
        Origin::Store => "pager-store",
        Origin::Memory => "pager-memory",
        Origin::File => "pager-file",
    };
    let news = |news| {
        if let News::Event(event) = news {
            eprintln!("page server: {event:?}");
        }
    };
    Ok(Pager::spawn(&program(&[role])?, &log()?, news)?)
}

/// Bytes in a file without a name.
pub fn memory_file(bytes: &[u8]) -> Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create("bench", flags)?);
    file.write_all(bytes)?;
    std::io::Seek::rewind(&mut file)?;
    Ok(file)
}
