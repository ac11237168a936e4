//! The smallest page server: it copies pages straight into the machine. That
//! shares nothing between machines, which is what tests of one machine need.
#![expect(unsafe_code, reason = "Uffd is made of a raw descriptor")]

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use coppice_runtime::protocol::{Content, PAGE_SIZE, Region};
use userfaultfd::{Error, Event, Uffd};

use crate::harness::{Machine, Snapshot};

/// Serves one machine until dropped.
pub(crate) struct Pager {
    stop: Arc<AtomicBool>,
    /// Held by whoever wants no page to arrive.
    pub(crate) hold: Arc<Mutex<()>>,
    pub(crate) faults: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Image {
    region: Region,
    file: File,
}

impl Pager {
    pub(crate) fn serve(machine: &Machine, snapshot: &Snapshot) -> Self {
        let raw = machine.uffd.try_clone().unwrap().into_raw_fd();
        // SAFETY: the descriptor is a userfaultfd and belongs to nobody else.
        let uffd = unsafe { Uffd::from_raw_fd(raw) };
        let images: Vec<Image> = machine
            .regions
            .iter()
            .map(|region| {
                let file = match region.content {
                    Content::Memory => &snapshot.memory,
                    Content::Disk(_) => &snapshot.disk,
                };
                Image { region: *region, file: file.try_clone().unwrap() }
            })
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let hold = Arc::new(Mutex::new(()));
        let faults = Arc::new(AtomicU64::new(0));
        let (stopped, held, counted) = (Arc::clone(&stop), Arc::clone(&hold), Arc::clone(&faults));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let _free = held.lock().unwrap();
                match uffd.read_event() {
                    Ok(Some(Event::Pagefault { addr, .. })) => {
                        counted.fetch_add(1, Ordering::Relaxed);
                        fill(&uffd, &images, addr as u64);
                    }
                    Ok(_) => std::thread::sleep(std::time::Duration::from_micros(50)),
                    Err(error) => panic!("{error}"),
                }
            }
        });
        Self { stop, hold, faults, thread: Some(thread) }
    }
}

fn fill(uffd: &Uffd, images: &[Image], address: u64) {
    let page = address - address % PAGE_SIZE;
    let holds = |image: &&Image| {
        (image.region.address..image.region.address + image.region.len).contains(&page)
    };
    let image = images.iter().find(holds).expect("a fault lies in a region");
    let mut bytes = [0u8; 4096];
    image.file.read_exact_at(&mut bytes, page - image.region.address).unwrap();
    // SAFETY: the target is a registered page of the other process.
    let copied = unsafe { uffd.copy(bytes.as_ptr().cast(), page as *mut _, bytes.len(), true) };
    match copied {
        // Two threads may fault on one page; the process may be gone.
        Ok(_) | Err(Error::CopyFailed(_)) => {}
        Err(error) => panic!("{error}"),
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
