//! The machines of a store, by name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};

use super::machine::{Machine, lock};

/// Longest machine name; it becomes a folder and a host name.
const NAME_MAX: usize = 63;

/// All machines, and the names that are being made.
#[derive(Debug, Default)]
pub(crate) struct Table {
    slots: Mutex<BTreeMap<String, Option<Arc<Machine>>>>,
    /// For a prefix, a number that no lower free one is known of: the search for
    /// the next free name must not begin at one among thousands.
    lowest_free: Mutex<BTreeMap<String, u64>>,
}

/// A name that nobody else can take; given back on drop unless it is filled.
#[derive(Debug)]
pub(crate) struct Reserved<'a> {
    table: &'a Table,
    pub(crate) name: String,
    filled: bool,
}

impl Table {
    /// Takes a name for a machine that is about to be made.
    pub(crate) fn reserve(&self, name: &str) -> Result<Reserved<'_>> {
        check_name(name)?;
        let mut slots = lock(&self.slots);
        if slots.contains_key(name) {
            bail!(
                "a machine named {name} exists already: choose another --name, or remove it with `coppice rm {name}`"
            );
        }
        slots.insert(name.to_owned(), None);
        Ok(Reserved { table: self, name: name.to_owned(), filled: false })
    }

    /// The first `count` free names `PREFIX-1`, `PREFIX-2`, …
    pub(crate) fn reserve_series(&self, prefix: &str, count: u32) -> Result<Vec<Reserved<'_>>> {
        let mut reserved = Vec::new();
        let begin = lock(&self.lowest_free).get(prefix).copied().unwrap_or(1);
        let mut number = begin;
        while reserved.len() < usize::try_from(count)? {
            let name = format!("{prefix}-{number}");
            check_name(&name)?;
            number += 1;
            if !lock(&self.slots).contains_key(&name) {
                reserved.push(self.reserve(&name)?);
            }
        }
        // A name that became free meanwhile is left to the next search.
        let mut lowest_free = lock(&self.lowest_free);
        let lowest = lowest_free.entry(prefix.to_owned()).or_insert(begin);
        if *lowest == begin {
            *lowest = number;
        }
        Ok(reserved)
    }

    /// A name is free again.
    fn freed(&self, name: &str) {
        let Some((prefix, number)) = name.rsplit_once('-') else { return };
        let Ok(number) = number.parse::<u64>() else { return };
        if let Some(lowest) = lock(&self.lowest_free).get_mut(prefix) {
            *lowest = number.max(1).min(*lowest);
        }
    }

    /// A machine by its name.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Machine>> {
        lock(&self.slots).get(name).cloned().flatten()
    }

    /// A machine by its name, or an error that says what to do.
    pub(crate) fn get(&self, name: &str) -> Result<Arc<Machine>> {
        match self.find(name) {
            Some(machine) => Ok(machine),
            None => bail!("there is no machine named {name}: `coppice ps` lists them"),
        }
    }

    /// All machines by name.
    pub(crate) fn list(&self) -> Vec<Arc<Machine>> {
        lock(&self.slots).values().flatten().cloned().collect()
    }

    /// Whether this very machine is here under its name.
    pub(crate) fn holds(&self, machine: &Arc<Machine>) -> bool {
        let slots = lock(&self.slots);
        matches!(slots.get(&machine.name), Some(Some(held)) if Arc::ptr_eq(held, machine))
    }

    /// Puts the machine that came back in the place of the one that it was.
    pub(crate) fn replace(&self, machine: &Arc<Machine>, again: &Arc<Machine>) {
        let mut slots = lock(&self.slots);
        if matches!(slots.get(&machine.name), Some(Some(held)) if Arc::ptr_eq(held, machine)) {
            slots.insert(again.name.clone(), Some(Arc::clone(again)));
        }
    }

    /// Forgets this very machine.
    pub(crate) fn remove_machine(&self, machine: &Arc<Machine>) {
        let mut slots = lock(&self.slots);
        if matches!(slots.get(&machine.name), Some(Some(held)) if Arc::ptr_eq(held, machine)) {
            slots.remove(&machine.name);
            drop(slots);
            self.freed(&machine.name);
        }
    }

    /// Adds a machine that was found on disk.
    pub(crate) fn restore(&self, machine: Machine) {
        lock(&self.slots).insert(machine.name.clone(), Some(Arc::new(machine)));
    }
}

impl Reserved<'_> {
    /// Puts the machine in its place.
    pub(crate) fn fill(mut self, machine: Arc<Machine>) {
        self.filled = true;
        lock(&self.table.slots).insert(self.name.clone(), Some(machine));
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.filled {
            lock(&self.table.slots).remove(&self.name);
            self.table.freed(&self.name);
        }
    }
}

/// A machine's name must do as a folder and as a host name.
fn check_name(name: &str) -> Result<()> {
    let fits = !name.is_empty()
        && name.len() <= NAME_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.');
    if !fits {
        bail!(
            "{name:?} cannot name a machine: use 1 to {NAME_MAX} letters, digits, '-', '_' or '.', starting with a letter or digit"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_until_its_reservation_is_dropped() {
        let table = Table::default();
        let first = table.reserve("web").unwrap();
        assert!(table.reserve("web").unwrap_err().to_string().contains("exists already"));
        drop(first);
        table.reserve("web").unwrap();
    }

    #[test]
    fn a_series_skips_names_in_use() {
        let table = Table::default();
        let _second = table.reserve("a-2").unwrap();
        let names: Vec<String> =
            table.reserve_series("a", 3).unwrap().iter().map(|r| r.name.clone()).collect();
        assert_eq!(names, ["a-1", "a-3", "a-4"]);
    }

    #[test]
    fn a_name_that_is_free_again_is_the_next_of_its_series() {
        let table = Table::default();
        let mut all = table.reserve_series("a", 5).unwrap();
        drop(all.remove(1));
        let names = |some: &[Reserved<'_>]| -> Vec<String> {
            some.iter().map(|reserved| reserved.name.clone()).collect()
        };
        let more = table.reserve_series("a", 2).unwrap();
        assert_eq!(names(&more), ["a-2", "a-6"]);
        drop(all);
        assert_eq!(names(&table.reserve_series("a", 1).unwrap()), ["a-1"]);
    }

    #[test]
    fn a_name_cannot_leave_its_folder() {
        let table = Table::default();
        for bad in ["", "..", "a/b", "-x", "a b", &"x".repeat(64)] {
            assert!(table.reserve(bad).is_err(), "{bad:?}");
        }
    }
}
