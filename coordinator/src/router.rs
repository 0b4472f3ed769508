//! Chooses a ready group for a request: fewest sequences ahead of it.
//!
//! Pure: the caller hands in what it knows of each group. Called by generation.rs; knows no text.

use evener_proto::ids::Epoch;

/// What is known of one ready group that can take the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    pub epoch: Epoch,
    /// Sequences this coordinator has there now.
    pub in_flight: u32,
    /// As the lead last reported, those of other coordinators included.
    pub running: u32,
    pub waiting: u32,
}

impl Candidate {
    /// The lead's report is a step old, our own count is not: the larger of both is nearer the
    /// truth.
    fn ahead(&self) -> u32 {
        self.in_flight.max(self.running.saturating_add(self.waiting))
    }
}

/// The index of the least loaded candidate, or none if there is none.
///
/// `avoid` is the epoch that just failed this request: taken only if nothing else is there. Equal
/// loads go to the lowest epoch, so that the choice is a function of its arguments.
#[must_use]
pub fn choose(candidates: &[Candidate], avoid: Option<Epoch>) -> Option<usize> {
    (0..candidates.len()).min_by_key(|&idx| {
        let candidate = &candidates[idx];
        (Some(candidate.epoch) == avoid, candidate.ahead(), candidate.epoch)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn candidate(epoch: u64, in_flight: u32, running: u32, waiting: u32) -> Candidate {
        Candidate { epoch: Epoch::parse(epoch).unwrap(), in_flight, running, waiting }
    }

    #[test]
    fn the_least_loaded_group_is_chosen() {
        let table: &[(&[Candidate], Option<u64>, Option<usize>)] = &[
            (&[], None, None),
            (&[candidate(1, 9, 9, 9)], None, Some(0)),
            (&[candidate(1, 2, 2, 0), candidate(2, 1, 1, 0)], None, Some(1)),
            // Requests of other coordinators count.
            (&[candidate(1, 0, 4, 3), candidate(2, 5, 5, 0)], None, Some(1)),
            // Our own count is fresher than the report.
            (&[candidate(1, 5, 0, 0), candidate(2, 2, 2, 0)], None, Some(1)),
            // Equal loads: lowest epoch, wherever it stands.
            (&[candidate(8, 0, 0, 0), candidate(3, 0, 0, 0)], None, Some(1)),
            // The epoch that failed us is the last resort, whatever its load.
            (&[candidate(1, 0, 0, 0), candidate(2, 9, 9, 9)], Some(1), Some(1)),
            (&[candidate(1, 0, 0, 0)], Some(1), Some(0)),
        ];
        for (candidates, avoid, expect) in table {
            let avoid = avoid.map(|n| Epoch::parse(n).unwrap());
            assert_eq!(choose(candidates, avoid), *expect, "{candidates:?} avoid {avoid:?}");
        }
    }
}
