//! Mixtures of experts on the CPU: an expert's tokens are put side by side, so that its matrices are
//! read once however many it has.

use evener_kernels::elementwise::silu_gate;
use evener_kernels::linear::{Input, Projection, Sum, linear, linear_parts};
use evener_kernels::routing;

use super::Step;
use crate::model::program::{BufferId, Expert, LeafSum, Room};

impl Step<'_> {
    pub(super) fn route(&mut self, logits: BufferId, out: BufferId) {
        let (n, n_out) = (self.weights.columns(logits), self.weights.columns(out));
        let mut routes = self.take(out);
        let logits = &self.rank.buffers[logits.0];
        for (logits, out) in
            logits.chunks_exact(n).zip(routes.chunks_exact_mut(n_out)).take(self.n_tokens)
        {
            routing::route(logits, out);
        }
        self.put(out, routes);
    }

    pub(super) fn experts(
        &mut self,
        [input, routes, out]: [BufferId; 3],
        experts: &[Expert],
        sum: &LeafSum,
        room: &Room,
    ) {
        let hidden = self.weights.columns(input);
        let n_used = self.weights.columns(routes) / 2;
        let mut outputs = self.take(out);
        let mut taking = std::mem::take(&mut self.rank.taking);
        for (e, expert) in experts.iter().enumerate() {
            taking.clear();
            let routes = self.rank.buffers[routes.0].chunks_exact(2 * n_used).take(self.n_tokens);
            for (token, routes) in routes.enumerate() {
                let place = routes[..n_used].iter().position(|&taken| taken == e as f32);
                taking.extend(place.map(|k| token * n_used + k));
            }
            if taking.is_empty() {
                continue;
            }
            let mut own = self.take(room.input);
            let all = &self.rank.buffers[input.0];
            for (own, &at) in own.chunks_exact_mut(hidden).zip(&taking) {
                own.copy_from_slice(&all[at / n_used * hidden..][..hidden]);
            }
            self.put(room.input, own);
            self.expert(expert, taking.len(), sum, room);
            let parts = self.rank.buffers[room.parts.0].chunks_exact(taking.len() * hidden);
            let rows = self.n_tokens * n_used * hidden;
            let parts = parts.zip(outputs.chunks_exact_mut(rows)).take(sum.part_leaves.len());
            for (part, outputs) in parts {
                for (row, &at) in part.chunks_exact(hidden).zip(&taking) {
                    outputs[at * hidden..][..hidden].copy_from_slice(row);
                }
            }
        }
        self.rank.taking = taking;
        self.put(out, outputs);
    }

    /// Of the first `n` rows of the room's input, to its parts.
    fn expert(&mut self, expert: &Expert, n: usize, sum: &LeafSum, room: &Room) {
        let [mut gate, mut up] = [self.take(room.gate), self.take(room.up)];
        let [mut activated, mut parts] = [self.take(room.activated), self.take(room.parts)];
        let rank = &mut *self.rank;
        let columns = self.weights.columns(room.input);
        let input = Input {
            x: &rank.buffers[room.input.0][..n * columns],
            rows: n,
            columns,
            scratch: &mut rank.activation,
        };
        let ffn = n * self.weights.columns(room.gate);
        let [gate_weight, up_weight, down_weight] =
            [expert.gate, expert.up, expert.down].map(|id| self.weights.matrix(id));
        let projections = &mut [
            Projection { weight: gate_weight, out: &mut gate[..ffn] },
            Projection { weight: up_weight, out: &mut up[..ffn] },
        ];
        linear(&mut rank.pool, rank.isa, input, projections);
        silu_gate(&mut rank.pool, rank.isa, &gate[..ffn], &up[..ffn], &mut activated[..ffn]);
        let input = Input {
            x: &activated[..ffn],
            rows: n,
            columns: ffn / n,
            scratch: &mut rank.activation,
        };
        let out = &mut parts[..sum.part_leaves.len() * n * columns];
        let sum = Sum {
            leaf_columns: sum.leaf_columns,
            part_leaves: &sum.part_leaves,
            merges: &sum.merges,
        };
        let projection = Projection { weight: down_weight, out };
        linear_parts(&mut rank.pool, rank.isa, input, projection, &sum);
        self.put(room.gate, gate);
        self.put(room.up, up);
        self.put(room.activated, activated);
        self.put(room.parts, parts);
    }

    pub(super) fn combine(&mut self, outputs: BufferId, routes: BufferId, out: BufferId) {
        let columns = self.weights.columns(out);
        let of = |id: BufferId| self.n_tokens * self.weights.columns(id);
        let (n_outputs, n_routes, n) = (of(outputs), of(routes), of(out));
        let mut sum = self.take(out);
        let rank = &mut *self.rank;
        let outputs = &rank.buffers[outputs.0][..n_outputs];
        let routes = &rank.buffers[routes.0][..n_routes];
        routing::combine(&mut rank.pool, rank.isa, outputs, routes, columns, &mut sum[..n]);
        self.put(out, sum);
    }
}
