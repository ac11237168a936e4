//! Looking at a store without owning it: what a supervisor would answer, from
//! a store that is open for reading only, in the process of the command.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::{Result, bail};
use coppice_engine::{Settings, Store};
use crossbeam_channel::unbounded;

use super::Supervisor;
use super::budget::Budget;
use super::paths::Paths;
use super::server::{self, Answer};
use crate::rpc::{Progress, Request};

/// A supervisor that only looks: it has no socket, no machines and no lock.
#[derive(Debug)]
pub(crate) struct View(Arc<Supervisor>);

impl View {
    /// Opens the store as it is at this moment.
    pub(crate) fn open(paths: Paths) -> Result<Self> {
        if !paths.store().join("FORMAT").exists() {
            bail!("there is no store in {}", paths.store().display());
        }
        let store = Store::open_read_only(paths.store(), &Settings::default())?;
        // Nobody listens, because there are no machines to tell of.
        let (news, _) = unbounded();
        let (lost, _) = unbounded();
        let supervisor =
            Supervisor::new(paths, store, Budget::new(None), (news, lost), Arc::default())?;
        Ok(Self(Arc::new(supervisor)))
    }

    /// Answers a request that changes nothing.
    pub(crate) fn answer(
        &self,
        request: Request,
        files: Vec<OwnedFd>,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Answer> {
        match request {
            Request::Export { .. }
            | Request::Read { .. }
            | Request::Snapshots
            | Request::Show { .. }
            | Request::Diff { .. }
            | Request::Lineage { .. }
            | Request::Stats
            | Request::Usage { .. }
            | Request::Check(_) => server::answer(&self.0, request, files, (&|| false, report)),
            _ => {
                bail!("this command changes the store or needs its machines: leave out --read-only")
            }
        }
    }
}
