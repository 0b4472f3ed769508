//! One step of one rank: its program's ops as launches.

use std::time::{Duration, Instant};

use evener_collective::{Collective, Tag};
use evener_kernels::cuda::attention::{self, Queries, Rows, WORDS};
use evener_kernels::cuda::linear::{self, Projection, embed, linear};
use evener_kernels::cuda::{Error as DeviceError, rows};

use super::plan::{Layout, Sizes};
use super::rank::{Prepared, Rank};
use super::sums::Sums;
use crate::backend::Error;
use crate::model::program::{BufferId, Op};

/// How often an op is launched to be timed: its time, not that of a launch, shall count.
const REPEATS: u32 = 20;

/// One step of one rank.
pub(super) struct Step<'a> {
    pub(super) rank: &'a Rank,
    pub(super) sizes: Sizes,
    pub(super) layout: Layout,
    /// Blocks in the step's tables.
    pub(super) n_tables: usize,
}

impl Step<'_> {
    /// All ops, meeting the other ranks through the host's memory.
    pub(super) fn run_over_hosts(
        &self,
        step: u64,
        collective: &mut dyn Collective,
        on_host: &mut [Vec<f32>; 2],
    ) -> Result<(), Error> {
        let mut n_met = 0;
        for (index, op) in self.rank.weights.program.ops.iter().enumerate() {
            match op {
                Op::AllReduce { parts, plan, out } => {
                    n_met += 1;
                    let tag = Tag { step, op: n_met };
                    let plan = &self.rank.weights.program.reduce_plans[plan.0];
                    let [mine, sum] = &mut *on_host;
                    mine.resize(self.len(*parts), 0.0);
                    sum.resize(self.len(*out), 0.0);
                    self.rank.buffers[parts.0].download(0, mine)?;
                    collective.all_reduce(tag, plan, mine, sum)?;
                    self.rank.buffers[out.0].upload(0, sum)?;
                }
                op => self.launch(index, op)?,
            }
        }
        Ok(())
    }

    /// All ops, on the device: of a rank that has no others to meet, or whose device meets theirs.
    pub(super) fn run(&self, records: bool, mut sums: Option<&mut Sums<'_>>) -> Result<(), Error> {
        for (index, op) in self.rank.weights.program.ops.iter().enumerate() {
            let Op::AllReduce { parts, out, .. } = op else {
                self.launch(index, op)?;
                continue;
            };
            let [from, to] = [parts, out].map(|id| &self.rank.buffers[id.0]);
            let n = self.len(*out);
            let Some(sums) = &mut sums else {
                assert_eq!(self.len(*parts), n, "one rank owns every leaf, in one part");
                to.copy(0, from, 0, n)?;
                continue;
            };
            rows::add_parts(from, self.rank.weights.program.buffers[parts.0].n_parts, to, n)?;
            sums.all_reduce(to, n)?;
            if !records {
                sums.pace()?;
            }
        }
        Ok(())
    }

    /// How long each op takes, one after another, in program order and by what it makes; those that
    /// meet other ranks are left out. What they make is of no use afterwards.
    pub(super) fn time(&self) -> Result<Vec<(String, Duration)>, DeviceError> {
        let device = &self.rank.device;
        let mut times = Vec::new();
        for (index, op) in self.rank.weights.program.ops.iter().enumerate() {
            let Some(label) = self.label(op) else { continue };
            self.launch(index, op)?;
            device.synchronise()?;
            let began = Instant::now();
            for _ in 0..REPEATS {
                self.launch(index, op)?;
            }
            device.synchronise()?;
            times.push((label, began.elapsed() / REPEATS));
        }
        Ok(times)
    }

    fn label(&self, op: &Op) -> Option<String> {
        let name = |id: &BufferId| self.rank.weights.program.buffers[id.0].name;
        Some(match op {
            Op::Embed { .. } => "embed".to_owned(),
            Op::Norm { .. } => "norm".to_owned(),
            Op::Linear { projections, .. } => {
                let names: Vec<&str> = projections.iter().map(|one| name(&one.out)).collect();
                format!("linear {}", names.join(", "))
            }
            Op::LinearParts { input, .. } => format!("linear of {}", name(input)),
            Op::RopeKv { .. } => "rope, kv".to_owned(),
            Op::Attention { .. } => "attention".to_owned(),
            Op::SiluGate { .. } => "silu, gate".to_owned(),
            Op::Head { .. } => "head".to_owned(),
            Op::AllReduce { .. } => return None,
        })
    }

    fn launch(&self, index: usize, op: &Op) -> Result<(), DeviceError> {
        let Rank { weights, buffers, scratch, prepared, .. } = self.rank;
        let Sizes { n_tokens, n_samples, .. } = self.sizes;
        let parts = || match &prepared[index] {
            Prepared::Parts(parts) => parts,
            Prepared::Nothing | Prepared::Heads(_) => unreachable!("prepared by its op"),
        };
        match op {
            Op::Embed { table, out } => {
                let first_row = weights.program.weights[table.0].rows.start;
                let tokens = scratch.words.view(self.layout.tokens, n_tokens);
                embed(weights.matrix(*table), first_row, tokens, &buffers[out.0])
            }
            Op::Norm { residual, delta, weight, eps, out } => {
                let delta = delta.map(|delta| &buffers[delta.0]);
                let weight = weights.vector(*weight);
                let (residual, out) = (&buffers[residual.0], &buffers[out.0]);
                rows::rms_norm(residual, delta, weight, *eps, out, n_tokens)
            }
            Op::Linear { input, projections } => {
                let parts = parts();
                let of = |one: &crate::model::program::Projection| Projection {
                    weight: weights.matrix(one.weight),
                    parts,
                    out: &buffers[one.out.0],
                };
                let projections: Vec<Projection<'_>> = projections.iter().map(of).collect();
                self.linear(*input, n_tokens, &projections)
            }
            Op::LinearParts { input, weight, out, .. } => {
                let (weight, out) = (weights.matrix(*weight), &buffers[out.0]);
                self.linear(*input, n_tokens, &[Projection { weight, parts: parts(), out }])
            }
            Op::RopeKv { q, k, v, layer, rope } => {
                let head_dim = weights.program.head_dim;
                let n_heads = weights.columns(*q) / head_dim;
                let [q, k, v] = [q, k, v].map(|id| &buffers[id.0]);
                let cache = &self.rank.caches[*layer];
                attention::rope_kv(
                    [q, k, v],
                    n_heads,
                    self.rows(),
                    self.rank.angles.of(rope),
                    cache,
                )
            }
            Op::Attention { q, layer, scale, out, .. } => {
                let Prepared::Heads(heads) = &prepared[index] else {
                    unreachable!("prepared by its op")
                };
                let (q, out) = (&buffers[q.0], &buffers[out.0]);
                self.attend(Queries { q, heads, scale: *scale, out }, *layer)
            }
            Op::SiluGate { gate, up, out } => {
                let [gate, up] = [gate, up].map(|id| &buffers[id.0]);
                rows::silu_gate(gate, up, &buffers[out.0], self.len(*out))
            }
            Op::Head { input, weight } => {
                let (columns, weight) = (weights.columns(*input), weights.matrix(*weight));
                let samples = scratch.words.view(self.layout.samples, n_samples);
                rows::take_rows(&buffers[input.0], samples, &scratch.sampled, columns)?;
                let out = &scratch.logits;
                let projection = Projection { weight, parts: parts(), out };
                let from = &scratch.sampled;
                linear(from, columns, n_samples, &scratch.activations, &[projection])
            }
            Op::AllReduce { .. } => unreachable!("met by the caller"),
        }
    }

    fn linear(
        &self,
        input: BufferId,
        n_tokens: usize,
        projections: &[linear::Projection<'_>],
    ) -> Result<(), DeviceError> {
        let columns = self.rank.weights.columns(input);
        let activations = &self.rank.scratch.activations;
        linear(&self.rank.buffers[input.0], columns, n_tokens, activations, projections)
    }

    fn attend(&self, queries: Queries<'_>, layer: usize) -> Result<(), DeviceError> {
        let (words, cache) = (&self.rank.scratch.words, &self.rank.caches[layer]);
        let Sizes { n_tokens, n_items, n_tiles, .. } = self.sizes;
        if n_items > 0 {
            let items = words.view(self.layout.items, WORDS * n_items);
            let first_items = words.view(self.layout.first_items, n_tokens + 1);
            let parts = self.rank.scratch.attended.as_ref().expect("there is attention");
            attention::attend(queries, self.rows(), items, first_items, cache, parts)?;
        }
        if n_tiles > 0 {
            let tiles = words.view(self.layout.tiles, WORDS * n_tiles);
            attention::attend_tiles(queries, self.rows(), tiles, cache)?;
        }
        Ok(())
    }

    fn rows(&self) -> Rows<'_> {
        let (words, n) = (&self.rank.scratch.words, self.sizes.n_tokens);
        Rows {
            positions: words.view(self.layout.positions, n),
            slots: words.view(self.layout.slots, n),
            first_blocks: words.view(self.layout.first_blocks, n),
            tables: words.view(self.layout.tables, self.n_tables),
        }
    }

    /// Numbers of a buffer in this step.
    fn len(&self, id: BufferId) -> usize {
        let buffer = &self.rank.weights.program.buffers[id.0];
        buffer.n_parts * self.sizes.n_tokens * buffer.columns
    }
}
