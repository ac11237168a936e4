//! Making the machines of one request, all of them or none.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;

use super::Supervisor;
use super::launch::Template;
use super::machine::Machine;
use super::table::Reserved;
use super::workers::at_once;
use crate::rpc::{Fork, Progress, Ready};

/// Machines that one request makes at the same time.
const AT_ONCE: usize = 16;

impl Supervisor {
    /// Makes all the machines that were asked for, or none.
    pub(super) fn make_or_none(
        &self,
        template: &Template,
        what: (&Fork, Vec<Reserved<'_>>),
        begun: Instant,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Ready>> {
        let mut machines = Vec::new();
        if let Err(error) = self.make_all(template, what, begun, &mut machines, report) {
            // All or nothing: nobody is told the names of a part.
            // Their names may be other machines' by now.
            for (made, _) in machines {
                if let Err(error) = self.remove_this(&made) {
                    tracing::warn!(machine = made.name, %error, "cannot remove it");
                }
            }
            return Err(error);
        }
        Ok(machines.into_iter().map(|(_, ready)| ready).collect())
    }

    /// Most of making a machine is waiting for the kernel and for other
    /// processes, so many are made at a time. Those that were made are there in
    /// the order of their names, even if others could not be.
    fn make_all(
        &self,
        template: &Template,
        (fork, reserved): (&Fork, Vec<Reserved<'_>>),
        begun: Instant,
        made: &mut Vec<(Arc<Machine>, Ready)>,
        report: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let count = reserved.len();
        let _expected = self.nursery.expect(count);
        // The first is timed from the request; each later one from the
        // moment its turn came.
        let turns = reserved.into_iter().enumerate();
        let make = |(turn, reserved): (usize, Reserved<'_>)| {
            let begun = if turn == 0 { begun } else { Instant::now() };
            self.make(template, reserved, begun, fork.paused).map(|made| (turn, made))
        };
        let mut done = Vec::new();
        let result = at_once(turns, count.min(AT_ONCE), make, |made| {
            done.push(made);
            report(Progress {
                what: "forking".to_owned(),
                done: u64::try_from(done.len()).unwrap_or(u64::MAX),
                total: u64::from(fork.count),
                bytes: false,
                new_bytes: None,
            });
        });
        done.sort_unstable_by_key(|(turn, _)| *turn);
        made.extend(done.into_iter().map(|(_, made)| made));
        result
    }
}
