//! Long work: what runs and since when, as a spinner on a terminal and as a
//! line now and then elsewhere.

use std::io::IsTerminal;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two lines where there is no terminal.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// A running piece of work. Dropping it without [`Task::done`] says nothing:
/// the error that ended it does.
#[derive(Debug)]
pub(crate) struct Task {
    what: String,
    begun: Instant,
    sign: Sign,
}

#[derive(Debug)]
enum Sign {
    Spinner(ProgressBar),
    Lines { _heartbeat: Heartbeat },
}

/// Whether the program that runs draws on the terminal itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Terminal {
    /// It is quiet: a spinner may be drawn.
    Ours,
    /// It shows its own progress, as cargo does.
    Theirs,
}

impl Task {
    /// Says what begins.
    pub(crate) fn begin(what: &str, terminal: Terminal) -> Self {
        let begun = Instant::now();
        let on_terminal = std::io::stderr().is_terminal();
        let sign = if on_terminal && terminal == Terminal::Ours {
            Sign::Spinner(spinner(what))
        } else {
            eprintln!("xtask: {what}");
            let period = if on_terminal { None } else { Some(HEARTBEAT) };
            Sign::Lines { _heartbeat: Heartbeat::start(what, begun, period) }
        };
        Self { what: what.to_owned(), begun, sign }
    }

    /// Says how long it took.
    pub(crate) fn done(self) {
        if let Sign::Spinner(bar) = &self.sign {
            bar.finish_and_clear();
        }
        eprintln!("xtask: {}: done in {}", self.what, elapsed(self.begun));
    }
}

fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed_precise}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// A thread that says now and then that the work still runs.
#[derive(Debug)]
struct Heartbeat {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    fn start(what: &str, begun: Instant, period: Option<Duration>) -> Self {
        let Some(period) = period else {
            return Self { stop: None, thread: None };
        };
        let what = what.to_owned();
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(period) {
                eprintln!("xtask: {what} … {}", elapsed(begun));
            }
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It only prints; if it panicked there is nothing left to undo.
            drop(thread.join());
        }
    }
}

fn elapsed(begun: Instant) -> String {
    readable(begun.elapsed())
}

fn readable(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        seconds => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well() {
        assert_eq!(readable(Duration::from_millis(1234)), "1.2 s");
        assert_eq!(readable(Duration::from_secs(60)), "1 min 00 s");
        assert_eq!(readable(Duration::from_secs(605)), "10 min 05 s");
    }
}
