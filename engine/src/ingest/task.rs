//! Work that goes on in the pool of all cores while its owner does something
//! else.

use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

/// Work that was begun; its result is asked for once.
#[derive(Debug)]
pub(super) struct Task<T>(Receiver<T>);

/// Begins work.
pub(super) fn begin<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Task<T> {
    let (sender, receiver) = sync_channel(1);
    // Who no longer waits wants no result.
    rayon::spawn(move || drop(sender.send(work())));
    Task(receiver)
}

impl<T> Task<T> {
    /// Waits for the result. A caller that is itself one of the pool's threads
    /// does other work of the pool meanwhile, so a pool of one does not wait
    /// for itself.
    pub(super) fn wait(self) -> T {
        let lost = "a task that panics ends the process";
        if rayon::current_thread_index().is_none() {
            return self.0.recv().expect(lost);
        }
        loop {
            match self.0.try_recv() {
                Ok(result) => return result,
                Err(TryRecvError::Disconnected) => panic!("{lost}"),
                Err(TryRecvError::Empty) => {
                    if rayon::yield_now() != Some(rayon::Yield::Executed) {
                        std::thread::yield_now();
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_back_also_inside_a_pool_of_one() {
        assert_eq!(begin(|| 7).wait(), 7);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
        let sum = pool.install(|| {
            let tasks: Vec<_> = (0..100_u32).map(|number| begin(move || number)).collect();
            tasks.into_iter().map(Task::wait).sum::<u32>()
        });
        assert_eq!(sum, 4950);
    }
}
