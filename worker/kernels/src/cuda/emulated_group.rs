//! A group of emulated devices, all of one process: what NCCL is to cards.
//!
//! As there, a member that does not come to a sum holds up the queues of all others, until each of
//! them leaves.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::group::{ID_BYTES, Id};

/// Groups that were named in this process. Tests name few, and end.
static TABLES: OnceLock<Mutex<HashMap<Id, Arc<Table>>>> = OnceLock::new();
static N_NAMED: AtomicU64 = AtomicU64::new(0);

pub(super) fn new_id() -> Id {
    let mut id = [0; ID_BYTES];
    id[..8].copy_from_slice(&N_NAMED.fetch_add(1, Ordering::Relaxed).to_ne_bytes());
    Id(id)
}

/// Where the members of a group meet.
#[derive(Default)]
struct Table(Mutex<Sums>);

#[derive(Default)]
struct Sums {
    n_joined: usize,
    /// By number of the sum, what each rank brought, until all have fetched it.
    brought: HashMap<u64, Brought>,
}

struct Brought {
    by_rank: Vec<Option<Vec<f32>>>,
    n_fetched: usize,
}

/// One member's place.
pub(super) struct Seat {
    table: Arc<Table>,
    rank: usize,
    world_size: usize,
    /// Of the next sum.
    number: AtomicU64,
    has_left: AtomicBool,
}

impl Seat {
    pub(super) fn take(id: &Id, rank: usize, world_size: usize) -> Self {
        let mut tables = lock(TABLES.get_or_init(Mutex::default));
        let table = Arc::clone(tables.entry(*id).or_default());
        lock(&table.0).n_joined += 1;
        let (number, has_left) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { table, rank, world_size, number, has_left }
    }

    /// Whether all have joined.
    pub(super) fn is_complete(&self) -> bool {
        lock(&self.table.0).n_joined == self.world_size
    }

    /// Brings `numbers` to the next sum, and makes them all ranks' once all have come. Whether that
    /// is done, or given up; else it is to be called again with the same.
    pub(super) fn sum(&self, numbers: &mut [f32]) -> bool {
        if self.has_left.load(Ordering::Relaxed) {
            return true;
        }
        let number = self.number.load(Ordering::Relaxed);
        let mut sums = lock(&self.table.0);
        let of_all = || Brought { by_rank: vec![None; self.world_size], n_fetched: 0 };
        let brought = sums.brought.entry(number).or_insert_with(of_all);
        brought.by_rank[self.rank].get_or_insert_with(|| numbers.to_vec());
        if !brought.by_rank.iter().all(Option::is_some) {
            return false;
        }
        numbers.fill(0.0);
        for of_rank in brought.by_rank.iter().flatten() {
            assert_eq!(of_rank.len(), numbers.len(), "members sum as many numbers");
            numbers.iter_mut().zip(of_rank).for_each(|(sum, number)| *sum += number);
        }
        brought.n_fetched += 1;
        if brought.n_fetched == self.world_size {
            sums.brought.remove(&number);
        }
        self.number.store(number + 1, Ordering::Relaxed);
        true
    }

    pub(super) fn leave(&self) {
        self.has_left.store(true, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_waits_for_all_or_is_given_up() {
        let id = new_id();
        let one = Seat::take(&id, 0, 2);
        assert!(!one.is_complete());
        let other = Seat::take(&id, 1, 2);
        assert!(one.is_complete());
        let (mut of_one, mut of_other) = ([1.0, 2.0], [10.0, 20.0]);
        assert!(!one.sum(&mut of_one));
        assert!(other.sum(&mut of_other) && one.sum(&mut of_one));
        assert_eq!((of_one, of_other), ([11.0, 22.0], [11.0, 22.0]));
        assert!(!other.sum(&mut of_other));
        other.leave();
        assert!(other.sum(&mut of_other), "whoever has left waits for nobody");
    }
}
