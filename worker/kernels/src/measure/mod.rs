//! What this machine can do at most, and what single kernels make of it: read bandwidth, arithmetic
//! peaks, one linear layer. For `evener bench`; nothing here is on the step path.

pub mod bandwidth;
pub mod linear;
pub mod peaks;

#[cfg(target_arch = "x86_64")]
mod amx;

/// Repeated measurements of one rate, per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    pub best: f64,
    pub median: f64,
}

impl Rate {
    /// # Panics
    /// Without any measurement.
    #[must_use]
    pub fn of(mut rates: Vec<f64>) -> Self {
        rates.sort_by(f64::total_cmp);
        let best = *rates.last().expect("at least one measurement");
        Self { best, median: rates[rates.len() / 2] }
    }
}
