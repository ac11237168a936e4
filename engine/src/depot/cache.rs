//! A bounded map: what was put in first goes out first.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// Values with weights, whose sum stays within a limit.
#[derive(Debug)]
pub(super) struct Cache<K, V> {
    values: HashMap<K, (V, usize)>,
    order: VecDeque<K>,
    weight: usize,
    weight_max: usize,
}

impl<K: Hash + Eq + Copy, V: Clone> Cache<K, V> {
    pub(super) fn new(weight_max: usize) -> Self {
        Self { values: HashMap::new(), order: VecDeque::new(), weight: 0, weight_max }
    }

    pub(super) fn get(&self, key: &K) -> Option<V> {
        self.values.get(key).map(|(value, _)| value.clone())
    }

    /// Keeps a value. One that alone exceeds the limit is kept until the next.
    pub(super) fn put(&mut self, key: K, value: V, weight: usize) {
        if self.values.contains_key(&key) {
            return;
        }
        while self.weight + weight > self.weight_max {
            let Some(oldest) = self.order.pop_front() else { break };
            if let Some((_, freed)) = self.values.remove(&oldest) {
                self.weight -= freed;
            }
        }
        self.values.insert(key, (value, weight));
        self.order.push_back(key);
        self.weight += weight;
    }

    /// Keeps a value in place of what the key has.
    pub(super) fn replace(&mut self, key: K, value: V, weight: usize) {
        match self.values.get_mut(&key) {
            Some(kept) => {
                self.weight = self.weight - kept.1 + weight;
                *kept = (value, weight);
            }
            None => self.put(key, value, weight),
        }
    }

    /// Forgets one value.
    pub(super) fn remove(&mut self, key: &K) {
        if let Some((_, freed)) = self.values.remove(key) {
            self.weight -= freed;
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
}
