//! Doing the same with many things at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::mpsc::channel;

use anyhow::{Context, Result, anyhow};

use super::machine::lock;

/// Does `work` for each item on so many threads, and passes what comes of it
/// to `done`, on this thread, in the order in which it comes. After the first
/// failure no other item is begun; that failure is returned. A panic is a failure:
/// what was done is told all the same.
pub(super) fn at_once<I: Send, O: Send>(
    items: impl Iterator<Item = I> + Send,
    threads: usize,
    work: impl Fn(I) -> Result<O> + Sync,
    mut done: impl FnMut(O),
) -> Result<()> {
    let work = |item| {
        // It has said what happened where it did.
        catch_unwind(AssertUnwindSafe(|| work(item)))
            .unwrap_or_else(|_| Err(anyhow!("a worker panicked: see the supervisor's log")))
    };
    if threads <= 1 {
        return items.map(work).try_for_each(|output| output.map(&mut done));
    }
    let items = Mutex::new(Some(items));
    let (sender, outputs) = channel();
    std::thread::scope(|scope| {
        let mut failure = None;
        for _ in 0..threads {
            let (sender, queue, work) = (sender.clone(), &items, &work);
            let spawned = std::thread::Builder::new().name("worker".to_owned()).spawn_scoped(
                scope,
                move || {
                    while let Some(item) = next(queue) {
                        // Whoever waits for it is there until this thread ends.
                        drop(sender.send(work(item)));
                    }
                },
            );
            if let Err(error) = spawned {
                lock(&items).take();
                failure = Some(error);
                break;
            }
        }
        drop(sender);
        let mut result = failure.map_or(Ok(()), |error| Err(error).context("no more threads"));
        for output in outputs {
            match output {
                Ok(output) => done(output),
                Err(error) => {
                    lock(&items).take();
                    result = result.and(Err(error));
                }
            }
        }
        result
    })
}

fn next<I>(items: &Mutex<Option<impl Iterator<Item = I>>>) -> Option<I> {
    lock(items).as_mut()?.next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_item_is_done_once() {
        for threads in [1, 4] {
            let mut sum = 0;
            at_once(0..100, threads, |number| Ok(number * 2), |number| sum += number).unwrap();
            assert_eq!(sum, 9900, "{threads} threads");
        }
    }

    #[test]
    fn a_panic_is_a_failure_and_what_was_done_is_told() {
        for threads in [1, 4] {
            let mut done = Vec::new();
            let work = |number: u32| {
                assert_ne!(number, 10, "wanted");
                Ok(number)
            };
            at_once(0..1_000_000, threads, work, |number| done.push(number)).unwrap_err();
            assert!((0..10).all(|number| done.contains(&number)), "{threads} threads");
        }
    }

    #[test]
    fn nothing_is_begun_after_a_failure_and_what_was_done_is_told() {
        for threads in [1, 4] {
            let mut done = Vec::new();
            let work = |number: u32| match number {
                10 => anyhow::bail!("not {number}"),
                number => Ok(number),
            };
            let error = at_once(0..1_000_000, threads, work, |number| done.push(number));
            assert_eq!(error.unwrap_err().to_string(), "not 10");
            assert!((0..10).all(|number| done.contains(&number)), "{threads} threads");
            assert!(done.len() < 1_000_000 - 1);
        }
    }
}
