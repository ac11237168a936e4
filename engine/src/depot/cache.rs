//! A bounded map: what was put in first goes out first, unless it was asked
//! for since; then it is spared once. So a long reading in order does not push
//! out what is asked for again and again.

use std::collections::VecDeque;
use std::hash::Hash;

use foldhash::{HashMap as FastMap, HashMapExt};

#[derive(Debug)]
struct Kept<V> {
    value: V,
    weight: usize,
    was_used: bool,
}

/// Values with weights, whose sum stays within a limit.
#[derive(Debug)]
pub(super) struct Cache<K, V> {
    values: FastMap<K, Kept<V>>,
    order: VecDeque<K>,
    weight: usize,
    weight_max: usize,
}

impl<K: Hash + Eq + Copy, V: Clone> Cache<K, V> {
    pub(super) fn new(weight_max: usize) -> Self {
        Self { values: FastMap::new(), order: VecDeque::new(), weight: 0, weight_max }
    }

    /// Changes the limit.
    pub(super) fn set_weight_max(&mut self, weight_max: usize) {
        self.weight_max = weight_max;
        self.make_room(0);
    }

    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        let kept = self.values.get_mut(key)?;
        kept.was_used = true;
        Some(kept.value.clone())
    }

    /// Keeps a value. One that alone exceeds the limit is kept until the next.
    pub(super) fn put(&mut self, key: K, value: V, weight: usize) {
        if self.values.contains_key(&key) {
            return;
        }
        self.make_room(weight);
        self.values.insert(key, Kept { value, weight, was_used: false });
        self.order.push_back(key);
        self.weight += weight;
    }

    fn make_room(&mut self, weight: usize) {
        while self.weight + weight > self.weight_max {
            let Some(oldest) = self.order.pop_front() else { break };
            match self.values.get_mut(&oldest) {
                Some(kept) if kept.was_used => {
                    kept.was_used = false;
                    self.order.push_back(oldest);
                }
                Some(kept) => {
                    self.weight -= kept.weight;
                    self.values.remove(&oldest);
                }
                None => {}
            }
        }
    }

    /// Keeps a value in place of what the key has.
    pub(super) fn replace(&mut self, key: K, value: V, weight: usize) {
        match self.values.get_mut(&key) {
            Some(kept) => {
                self.weight = self.weight - kept.weight + weight;
                (kept.value, kept.weight) = (value, weight);
            }
            None => self.put(key, value, weight),
        }
    }

    /// Forgets one value.
    pub(super) fn remove(&mut self, key: &K) {
        if let Some(kept) = self.values.remove(key) {
            self.weight -= kept.weight;
            self.order.retain(|other| other != key);
        }
    }

    pub(super) fn clear(&mut self) {
        self.values.clear();
        self.order.clear();
        self.weight = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first() {
        let mut cache = Cache::new(10);
        cache.put(1, 'a', 4);
        cache.put(2, 'b', 4);
        cache.put(3, 'c', 4);
        assert_eq!((cache.get(&1), cache.get(&2), cache.get(&3)), (None, Some('b'), Some('c')));
        cache.put(4, 'd', 100);
        assert_eq!((cache.get(&3), cache.get(&4)), (None, Some('d')));
        cache.put(5, 'e', 1);
        assert_eq!((cache.get(&4), cache.get(&5)), (None, Some('e')));
    }

    #[test]
    fn what_was_asked_for_is_spared_once() {
        let mut cache = Cache::new(12);
        (1..=3).for_each(|key| cache.put(key, 'x', 4));
        assert!(cache.get(&1).is_some());
        cache.put(4, 'x', 4);
        cache.put(5, 'x', 4);
        let left: Vec<i32> = (1..=5).filter(|key| cache.get(key).is_some()).collect();
        assert_eq!(left, [1, 4, 5]);
    }

    #[test]
    fn what_is_replaced_weighs_what_it_weighs() {
        let mut cache = Cache::new(10);
        cache.put(1, 'a', 8);
        cache.replace(1, 'b', 2);
        cache.put(2, 'c', 8);
        assert_eq!((cache.get(&1), cache.get(&2)), (Some('b'), Some('c')));
    }
}
