//! Steps that were recorded, by their sizes. A step of sizes that came before is one launch.

use std::collections::HashMap;
use std::hash::Hash;

/// Graphs that are kept; each holds some megabytes of the device's memory.
const MOST: usize = 64;

/// What to do with a step.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// It is the first of its sizes: whatever the device does once, it does now.
    Run,
    /// It came before: its like is worth recording.
    Record,
    Replay,
}

/// Recorded steps by key, the longest unused forgotten first.
#[derive(Debug)]
pub(super) struct Graphs<K, G> {
    /// None of sizes that were seen once.
    known: HashMap<K, Entry<G>>,
    clock: u64,
}

#[derive(Debug)]
struct Entry<G> {
    graph: Option<G>,
    used: u64,
}

impl<K, G> Default for Graphs<K, G> {
    fn default() -> Self {
        Self { known: HashMap::with_capacity(MOST + 1), clock: 0 }
    }
}

impl<K: Copy + Eq + Hash, G> Graphs<K, G> {
    /// What to do with a step of sizes `key`, which it notes.
    pub(super) fn choose(&mut self, key: K) -> Choice {
        self.clock += 1;
        let used = self.clock;
        if let Some(entry) = self.known.get_mut(&key) {
            entry.used = used;
            return if entry.graph.is_some() { Choice::Replay } else { Choice::Record };
        }
        if self.known.len() == MOST {
            let oldest = self.known.iter().min_by_key(|(_, entry)| entry.used);
            if let Some(oldest) = oldest.map(|(&key, _)| key) {
                self.known.remove(&oldest);
            }
        }
        self.known.insert(key, Entry { graph: None, used });
        Choice::Run
    }

    /// Keeps what was recorded for `key`, which was chosen for it.
    pub(super) fn keep(&mut self, key: K, graph: G) {
        let used = self.clock;
        self.known.insert(key, Entry { graph: Some(graph), used });
    }

    pub(super) fn get(&self, key: K) -> Option<&G> {
        self.known.get(&key)?.graph.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_runs_then_is_recorded_then_replayed() {
        let mut graphs = Graphs::default();
        assert_eq!(graphs.choose(1), Choice::Run);
        assert_eq!(graphs.choose(2), Choice::Run);
        assert_eq!(graphs.choose(1), Choice::Record);
        graphs.keep(1, "one");
        assert_eq!(graphs.choose(1), Choice::Replay);
        assert_eq!((graphs.get(1), graphs.get(2)), (Some(&"one"), None));
    }

    #[test]
    fn the_longest_unused_is_forgotten() {
        let mut graphs = Graphs::default();
        for key in 0..MOST {
            graphs.choose(key);
            graphs.keep(key, key);
        }
        graphs.choose(0);
        assert_eq!(graphs.choose(MOST), Choice::Run);
        assert_eq!((graphs.get(0), graphs.get(1), graphs.get(2)), (Some(&0), None, Some(&2)));
        assert_eq!(graphs.known.len(), MOST);
    }
}
