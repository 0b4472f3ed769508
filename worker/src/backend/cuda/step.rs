//! One step of one rank: its program's ops as launches.

use std::time::{Duration, Instant};

use evener_collective::{Collective, Tag};
use evener_kernels::cuda::activations::{self, Forms, Making, Normed};
use evener_kernels::cuda::attention::{self, Queries, Rows, WORDS};
use evener_kernels::cuda::linear::{self, Projection, embed};
use evener_kernels::cuda::matrix::Matrix;
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
    /// Whether there are no other ranks to meet.
    pub(super) is_alone: bool,
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
                    self.rank.buffer(*parts).download(0, mine)?;
                    collective.all_reduce(tag, plan, mine, sum)?;
                    self.rank.buffer(*out).upload(0, sum)?;
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
                if let (Op::Experts { .. }, Some(sums)) = (op, &mut sums) {
                    sums.wait()?; // for what the host reads, where a lost rank is heard
                }
                self.launch(index, op)?;
                continue;
            };
            if index > 0 && self.residual(index - 1).is_some() {
                continue; // added already
            }
            let [from, to] = [parts, out].map(|&id| self.rank.buffer(id));
            let n = self.len(*out);
            if !std::ptr::eq(from, to) {
                rows::add_parts(from, self.rank.weights.program.buffers[parts.0].n_parts, to, n)?;
            }
            let Some(sums) = &mut sums else {
                assert_eq!(self.len(*parts), n, "one rank owns every leaf, in one part");
                continue;
            };
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
            if self.normed(index).is_some() {
                continue; // in the time of the products
            }
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
            Op::Route { .. } => "route".to_owned(),
            Op::Experts { .. } => "experts".to_owned(),
            Op::Combine { .. } => "combine".to_owned(),
            Op::Head { .. } => "head".to_owned(),
            Op::AllReduce { .. } => return None,
        })
    }

    fn launch(&self, index: usize, op: &Op) -> Result<(), DeviceError> {
        let Rank { weights, scratch, prepared, .. } = self.rank;
        let buffer = |id: &BufferId| self.rank.buffer(*id);
        let Sizes { n_tokens, n_samples, .. } = self.sizes;
        match op {
            Op::Embed { table, out } => {
                let first_row = weights.program.weights[table.0].rows.start;
                let tokens = scratch.words.view(self.layout.tokens, n_tokens);
                embed(weights.matrix(*table), first_row, tokens, buffer(out))
            }
            Op::Norm { residual, delta, weight, eps, out } => {
                if self.normed(index).is_some() {
                    return Ok(()); // by the products that read it
                }
                let delta = if self.is_added(index) { None } else { delta.as_ref().map(buffer) };
                let to = self.making(index, *out);
                activations::rms_norm(buffer(residual), delta, weights.vector(*weight), *eps, to)
            }
            Op::Linear { .. } | Op::LinearParts { .. } => self.linear(index, op),
            Op::RopeKv { q, k, v, layer, rope } => {
                let head_dim = weights.program.head_dim;
                let n_heads = weights.columns(*q) / head_dim;
                let cache = &self.rank.caches[*layer];
                let angles = self.rank.angles.of(rope);
                attention::rope_kv([q, k, v].map(buffer), n_heads, self.rows(), angles, cache)
            }
            Op::Attention { q, layer, scale, out, .. } => {
                let Prepared::Heads(heads) = &prepared[index] else {
                    unreachable!("prepared by its op")
                };
                let queries = Queries { q: buffer(q), heads, scale: *scale };
                self.attend(queries, *layer, self.making(index, *out))
            }
            Op::SiluGate { gate, up, out } => {
                activations::silu_gate(buffer(gate), buffer(up), self.making(index, *out))
            }
            Op::Route { logits, n_used, out } => self.route(*logits, *n_used, *out),
            Op::Experts { input, routes, experts, room, out, .. } => {
                let Prepared::Experts(products) = &prepared[index] else {
                    unreachable!("prepared by its op")
                };
                self.experts(products, [*input, *routes, *out], experts, room)
            }
            Op::Combine { outputs, routes, out } => self.combine(*outputs, *routes, *out),
            Op::Head { input, weight } => {
                let (columns, weight) = (weights.columns(*input), weights.matrix(*weight));
                let samples = scratch.words.view(self.layout.samples, n_samples);
                let to = Making {
                    activations: &scratch.activations,
                    forms: Forms::read_by([weight], n_samples, &self.rank.device),
                    plain: &scratch.sampled,
                    columns,
                    n_tokens: n_samples,
                    normed: None,
                };
                activations::plain(buffer(input), Some(samples), to)?;
                let (parts, out) = (self.parts(index), &scratch.logits);
                let projection = Projection { weight, parts, out, adds: false };
                linear::multiply(to, &scratch.linear, &[projection])
            }
            Op::AllReduce { .. } => unreachable!("met by the caller"),
        }
    }

    fn parts(&self, index: usize) -> &linear::Parts {
        match &self.rank.prepared[index] {
            Prepared::Parts(parts) => parts,
            Prepared::Nothing | Prepared::Heads(_) | Prepared::Experts(_) => {
                unreachable!("prepared by its op")
            }
        }
    }

    /// What op `index` makes: as products take it if a linear op alone reads it, else rows of f32.
    fn making(&self, index: usize, out: BufferId) -> Making<'_> {
        let Rank { weights, scratch, feeds, device, .. } = self.rank;
        let n_tokens = self.sizes.n_tokens;
        let forms = feeds[index]
            .map_or(Forms::PLAIN, |fed| Forms::read_by(self.matrices_of(fed), n_tokens, device));
        Making {
            activations: &scratch.activations,
            forms,
            plain: self.rank.buffer(out),
            columns: weights.columns(out),
            n_tokens,
            normed: self.normed(index),
        }
    }

    /// The weights of a linear op.
    fn matrices_of(&self, index: usize) -> Vec<&Matrix> {
        let weights = &self.rank.weights;
        match &weights.program.ops[index] {
            Op::Linear { projections, .. } => {
                projections.iter().map(|one| weights.matrix(one.weight)).collect()
            }
            Op::LinearParts { weight, .. } => vec![weights.matrix(*weight)],
            _ => unreachable!("a linear op"),
        }
    }

    /// What op `index` adds its product to, instead of leaving it to a sum and a norm.
    fn residual(&self, index: usize) -> Option<BufferId> {
        self.rank.residuals[index].filter(|_| self.is_alone)
    }

    /// Whether what norm `index` should add to the residual is part of it already.
    fn is_added(&self, index: usize) -> bool {
        index >= 2 && self.residual(index - 2).is_some()
    }

    /// What the products behind norm `index` make theirs of, if they do that by themselves.
    fn normed(&self, index: usize) -> Option<Normed<'_>> {
        let Rank { weights, feeds, device, .. } = self.rank;
        let Op::Norm { residual, delta, weight, eps, .. } = &weights.program.ops[index] else {
            return None;
        };
        let takes = |fed| linear::takes_normed(self.matrices_of(fed), self.sizes.n_tokens, device);
        let is_all = delta.is_none() || self.is_added(index);
        let (row, weight) = (self.rank.buffer(*residual), weights.vector(*weight));
        (is_all && feeds[index].is_some_and(takes)).then_some(Normed { row, weight, eps: *eps })
    }

    fn linear(&self, index: usize, op: &Op) -> Result<(), DeviceError> {
        let Rank { weights, scratch, feeds, .. } = self.rank;
        let residual = self.residual(index);
        let of = |weight, out| Projection {
            weight: weights.matrix(weight),
            parts: self.parts(index),
            out: self.rank.buffer(residual.unwrap_or(out)),
            adds: residual.is_some(),
        };
        let (input, projections) = match op {
            Op::Linear { input, projections } => {
                (*input, projections.iter().map(|one| of(one.weight, one.out)).collect())
            }
            Op::LinearParts { input, weight, out, .. } => (*input, vec![of(*weight, *out)]),
            _ => unreachable!("a linear op"),
        };
        if index > 0 && feeds[index - 1] == Some(index) {
            let made = self.making(index - 1, input);
            return linear::multiply(made, &scratch.linear, &projections);
        }
        let (from, columns) = (self.rank.buffer(input), weights.columns(input));
        let (n_tokens, made) = (self.sizes.n_tokens, &scratch.activations);
        linear::linear(from, columns, n_tokens, made, &scratch.linear, &projections)
    }

    fn attend(
        &self,
        queries: Queries<'_>,
        layer: usize,
        to: Making<'_>,
    ) -> Result<(), DeviceError> {
        let (words, cache) = (&self.rank.scratch.words, &self.rank.caches[layer]);
        let Sizes { n_tokens, n_items, n_tiles, .. } = self.sizes;
        // Tiles write rows of f32, and then so does all else, and the rest is made of these.
        let goes_on = n_tiles == 0 && attention::merges_to(to.forms, self.rank.shape);
        let first = if goes_on { to } else { Making { forms: Forms::PLAIN, ..to } };
        if n_items > 0 {
            let items = words.view(self.layout.items, WORDS * n_items);
            let first_items = words.view(self.layout.first_items, n_tokens + 1);
            let parts = self.rank.scratch.attended.as_ref().expect("there is attention");
            attention::attend(queries, self.rows(), items, cache, parts)?;
            attention::merge(parts, first_items, queries.heads, first)?;
        }
        if n_tiles > 0 {
            let tiles = words.view(self.layout.tiles, WORDS * n_tiles);
            attention::attend_tiles(queries, self.rows(), tiles, cache, to.plain)?;
        }
        if !goes_on && to.forms != Forms::PLAIN {
            activations::plain(to.plain, None, to.without_plain())?;
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
