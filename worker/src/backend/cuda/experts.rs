//! Mixtures of experts on a device. The host reads where tokens go, once a layer, and has each
//! expert's products computed for its tokens alone; so steps of such models are not recorded.

use std::cell::RefCell;

use evener_kernels::cuda::activations::{self, Forms, Making};
use evener_kernels::cuda::linear::{self, Parts, Projection};
use evener_kernels::cuda::{Buffer, Device, Error as DeviceError, routing};

use super::step::Step;
use crate::model::program::{BufferId, Expert, LeafSum, Op, Program, Room, WeightId};

/// What an op of experts multiplies by.
pub(super) struct Products {
    /// Of gate and up.
    whole: Parts,
    /// Of down.
    sums: Parts,
}

impl Products {
    pub(super) fn new(
        device: &Device,
        program: &Program,
        input: BufferId,
        sum: &LeafSum,
    ) -> Result<Self, DeviceError> {
        let whole = Parts::new(device, [program.buffers[input.0].columns])?;
        let columns = sum.part_leaves.iter().map(|n| n * sum.leaf_columns);
        Ok(Self { whole, sums: Parts::new(device, columns)? })
    }
}

/// Where a layer's tokens go.
pub(super) struct Taking {
    /// Routes as the host reads them.
    routes: RefCell<Vec<f32>>,
    /// Places in the routes of the tokens of one expert after the other.
    places: RefCell<Vec<u32>>,
    on_device: Buffer<u32>,
}

impl Taking {
    /// For programs whose tokens go to experts; of none it takes no memory.
    pub(super) fn new(
        device: &Device,
        program: &Program,
        max_tokens: usize,
    ) -> Result<Self, DeviceError> {
        let n_used = |op: &Op| match op {
            Op::Route { n_used, .. } => Some(*n_used),
            _ => None,
        };
        let most = max_tokens * program.ops.iter().filter_map(n_used).max().unwrap_or(0);
        Ok(Self {
            routes: RefCell::new(Vec::with_capacity(2 * most)),
            places: RefCell::new(Vec::with_capacity(most)),
            on_device: device.buffer(most)?,
        })
    }

    pub(super) fn is_used(&self) -> bool {
        !self.on_device.is_empty()
    }
}

impl Step<'_> {
    pub(super) fn route(
        &self,
        logits: BufferId,
        n_used: usize,
        out: BufferId,
    ) -> Result<(), DeviceError> {
        let n = self.rank.weights.columns(logits);
        let [logits, out] = [logits, out].map(|id| self.rank.buffer(id));
        routing::route(logits, n, out, n_used, self.sizes.n_tokens)
    }

    pub(super) fn experts(
        &self,
        products: &Products,
        [input, routes, out]: [BufferId; 3],
        experts: &[Expert],
        room: &Room,
    ) -> Result<(), DeviceError> {
        let taking = &self.rank.scratch.taking;
        let (hidden, n_tokens) = (self.rank.weights.columns(input), self.sizes.n_tokens);
        let n_used = self.rank.weights.columns(routes) / 2;
        let mut read = taking.routes.borrow_mut();
        read.resize(n_tokens * 2 * n_used, 0.0);
        self.rank.buffer(routes).download(0, &mut read)?;
        let mut places = taking.places.borrow_mut();
        places.clear();
        for e in 0..experts.len() {
            places.extend(places_of(&read, n_used, e as f32));
        }
        taking.on_device.upload(0, &places)?;
        let [input, parts, out] = [input, room.parts, out].map(|id| self.rank.buffer(id));
        let own = self.rank.buffer(room.input);
        let mut first = 0;
        for (e, expert) in experts.iter().enumerate() {
            let n = places_of(&read, n_used, e as f32).count();
            if n == 0 {
                continue;
            }
            let places = || taking.on_device.view(first, n);
            routing::gather(input, places(), n_used, own, hidden)?;
            self.expert(products, expert, n, room)?;
            let n_to = n_tokens * n_used;
            routing::scatter(parts, products.sums.len(), places(), out, n_to, hidden)?;
            first += n;
        }
        Ok(())
    }

    /// Of the first `n` rows of the room's input, to its parts.
    fn expert(
        &self,
        products: &Products,
        expert: &Expert,
        n: usize,
        room: &Room,
    ) -> Result<(), DeviceError> {
        let (weights, scratch) = (&self.rank.weights, &self.rank.scratch);
        let buffer = |id: BufferId| self.rank.buffer(id);
        let matrix = |id: WeightId| weights.matrix(id);
        let of = |weight, parts, out| Projection {
            weight: matrix(weight),
            parts,
            out: buffer(out),
            adds: false,
        };
        let projections = [(expert.gate, room.gate), (expert.up, room.up)]
            .map(|(w, to)| of(w, &products.whole, to));
        let columns = weights.columns(room.input);
        let (made, few) = (&scratch.activations, &scratch.linear);
        linear::linear(buffer(room.input), columns, n, made, few, &projections)?;
        let to = Making {
            activations: made,
            forms: Forms::read_by([matrix(expert.down)], n, &self.rank.device),
            plain: buffer(room.activated),
            columns: weights.columns(room.activated),
            n_tokens: n,
            normed: None,
        };
        activations::silu_gate(buffer(room.gate), buffer(room.up), to)?;
        linear::multiply(to, few, &[of(expert.down, &products.sums, room.parts)])
    }

    pub(super) fn combine(
        &self,
        outputs: BufferId,
        routes: BufferId,
        out: BufferId,
    ) -> Result<(), DeviceError> {
        let (columns, n_used) =
            (self.rank.weights.columns(out), self.rank.weights.columns(routes) / 2);
        let [outputs, routes, out] = [outputs, routes, out].map(|id| self.rank.buffer(id));
        routing::combine(outputs, routes, n_used, out, columns, self.sizes.n_tokens)
    }
}

/// Places in the routes of the tokens that take an expert.
fn places_of(routes: &[f32], n_used: usize, expert: f32) -> impl Iterator<Item = u32> {
    let of_token = move |(token, routes): (usize, &[f32])| {
        let k = routes[..n_used].iter().position(|&taken| taken == expert)?;
        Some((token * n_used + k) as u32)
    };
    routes.chunks_exact(2 * n_used).enumerate().filter_map(of_token)
}
