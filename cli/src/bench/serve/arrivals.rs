//! When sessions begin: as soon as one ends (closed loop), or at random times of a given rate
//! (open loop). Pure: it is asked with what runs, and answers a time since the start.

use super::random::Random;

/// Stream of random numbers of the arrivals; sessions use theirs from 0.
const STREAM: u64 = u64::MAX;

#[derive(Debug, Clone)]
pub enum Arrivals {
    /// As many at once as this.
    Closed { concurrency: usize },
    /// A Poisson process: the gaps are exponentially distributed.
    Open { per_s: f64, next_s: f64, random: Random },
}

impl Arrivals {
    pub fn closed(concurrency: usize) -> Self {
        Self::Closed { concurrency }
    }

    /// `per_s` sessions a second on average.
    pub fn open(per_s: f64, seed: u64) -> Self {
        let mut arrivals = Self::Open { per_s, next_s: 0.0, random: Random::new(seed, STREAM) };
        arrivals.began();
        arrivals
    }

    /// When the next session begins, in seconds since the start; nothing if one has to end first.
    pub fn next_s(&self, running: usize, now_s: f64) -> Option<f64> {
        match self {
            Self::Closed { concurrency } => (running < *concurrency).then_some(now_s),
            Self::Open { next_s, .. } => Some(*next_s),
        }
    }

    /// A session has begun.
    pub fn began(&mut self) {
        if let Self::Open { per_s, next_s, random } = self {
            *next_s += -random.unit().ln() / *per_s;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(seed: u64, n: usize) -> Vec<f64> {
        let mut arrivals = Arrivals::open(4.0, seed);
        let next = |arrivals: &mut Arrivals| {
            let at = arrivals.next_s(usize::MAX, 0.0);
            arrivals.began();
            at
        };
        (0..n).filter_map(|_| next(&mut arrivals)).collect()
    }

    #[test]
    fn a_closed_loop_waits_until_one_ends() {
        let arrivals = Arrivals::closed(2);
        assert_eq!(arrivals.next_s(1, 3.0), Some(3.0));
        assert_eq!(arrivals.next_s(2, 3.0), None);
    }

    #[test]
    fn arrivals_are_poisson_of_the_rate_and_repeat_with_their_seed() {
        const N: usize = 40_000;
        let at = times(7, N);
        assert_eq!(at, times(7, N));
        assert_ne!(at[0], times(8, 1)[0]);
        let gaps: Vec<f64> = at.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // Four standard errors of the mean are 0.005, and the deviation equals the mean.
        assert!((mean - 0.25).abs() < 0.005, "{mean}");
        assert!((variance.sqrt() - mean).abs() < 0.01, "{variance}");
    }
}
