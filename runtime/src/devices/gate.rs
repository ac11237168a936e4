//! Parks the device threads.
//!
//! A device thread changes guest memory, an overlay or a queue only while it
//! holds a [`Pass`]. A closed gate hands out none, so once `close` returns
//! `true` nothing of the machine changes until `open`. Work that may wait for
//! remote bytes is done without a pass: a pause never waits for it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

#[derive(Debug)]
struct State {
    closed: bool,
    inside: u32,
}

/// One per machine; closed until the machine first runs.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// The right to change the machine, until dropped.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    gate: &'a Gate,
}

impl Gate {
    /// A closed gate.
    pub(crate) fn closed() -> Self {
        Self { state: Mutex::new(State { closed: true, inside: 0 }), changed: Condvar::new() }
    }

    /// Waits until the machine may change.
    pub(crate) fn enter(&self) -> Pass<'_> {
        let mut state = self.lock();
        while state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.inside += 1;
        Pass { gate: self }
    }

    /// Lets nobody in and waits until everybody is out; `false`, and open
    /// again, if that takes until after `deadline`.
    pub(crate) fn close(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        state.closed = true;
        while state.inside > 0 {
            let now = Instant::now();
            if now >= deadline {
                state.closed = false;
                self.changed.notify_all();
                return false;
            }
            let (again, _timeout) = self
                .changed
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner);
            state = again;
        }
        true
    }

    /// Lets everybody in.
    pub(crate) fn open(&self) {
        self.lock().closed = false;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The two fields are changed together with nothing that can panic
        // between them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.lock().inside -= 1;
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn closing_waits_for_those_inside() {
        let gate = Arc::new(Gate::closed());
        gate.open();
        let pass = gate.enter();
        assert!(!gate.close(Instant::now()), "closed over somebody's head");
        drop(pass);
        assert!(gate.close(Instant::now() + Duration::from_secs(60)));
    }

    #[test]
    fn nobody_enters_a_closed_gate() {
        let gate = Arc::new(Gate::closed());
        let waiting = Arc::clone(&gate);
        let (sender, entered) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let _pass = waiting.enter();
            sender.send(()).unwrap();
        });
        assert!(entered.try_recv().is_err());
        gate.open();
        entered.recv().unwrap();
        thread.join().unwrap();
    }
}
