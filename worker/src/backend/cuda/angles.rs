//! What positions turn queries and keys by: a table on the device that grows as sequences do.

use evener_kernels::cuda::attention::Rope;
use evener_kernels::cuda::{Buffer, Device, Error};

use crate::model::config::{Rope as RopeOf, RopePairs};
use crate::model::program::{Op, Program};

/// Positions whose angles are made at once.
const ANGLE_STEP: usize = 1024;

/// Cosines and sines of every position so far, on the device; made here, by libm's own functions,
/// as the CPU makes them.
pub(super) struct Angles {
    table: Buffer<f32>, // [position, cosines of the pairs then their sines]
    /// Radians a position, by pair.
    frequencies: Vec<f64>,
    n_known: usize,
    max_context: usize,
}

impl Angles {
    pub(super) fn new(
        device: &Device,
        program: &Program,
        max_context: usize,
    ) -> Result<Self, Error> {
        let rope = program.ops.iter().find_map(|op| match op {
            Op::RopeKv { rope, .. } => Some(*rope),
            _ => None,
        });
        let frequencies: Vec<f64> = rope.map_or(Vec::new(), |rope| {
            let exponent = |pair: usize| -2.0 * pair as f64 / rope.dim as f64;
            (0..rope.dim / 2).map(|i| libm::pow(f64::from(rope.theta), exponent(i))).collect()
        });
        let table = device.buffer(max_context * 2 * frequencies.len())?;
        Ok(Self { table, frequencies, n_known: 0, max_context })
    }

    /// Makes what positions below `end` still lack, and some more.
    pub(super) fn extend(&mut self, end: usize) -> Result<(), Error> {
        if end <= self.n_known || self.frequencies.is_empty() {
            return Ok(());
        }
        assert!(end <= self.max_context, "position {end} is beyond the context");
        let end = end.next_multiple_of(ANGLE_STEP).min(self.max_context);
        let mut new = Vec::with_capacity((end - self.n_known) * 2 * self.frequencies.len());
        for position in self.n_known..end {
            let angles = self.frequencies.iter().map(|frequency| position as f64 * frequency);
            new.extend(angles.clone().map(|angle| libm::cos(angle) as f32));
            new.extend(angles.map(|angle| libm::sin(angle) as f32));
        }
        self.table.upload(self.n_known * 2 * self.frequencies.len(), &new)?;
        self.n_known = end;
        Ok(())
    }

    pub(super) fn of(&self, rope: &RopeOf) -> Rope<'_> {
        Rope {
            angles: &self.table,
            n_pairs: self.frequencies.len(),
            is_adjacent: rope.pairs == RopePairs::Adjacent,
        }
    }
}
