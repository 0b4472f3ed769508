//! Op by op: every backend against plain f64 arithmetic, on small random programs, through the
//! public contract alone. Inputs come in by looking up token rows in tables of random numbers,
//! results go out through a head that is the identity.

#![allow(clippy::unwrap_used)]

mod support;

use std::ops::Range;

use candle_core::quantized::GgmlDType;
use evener_collective::{ReducePlan, SumTree};
use evener_worker::backend::{Kind, KvFormat};
use evener_worker::checkpoint::{Checkpoint, FileBytes};
use evener_worker::model::config::{Rope, RopePairs};
use evener_worker::model::program::{
    BufferId, LeafSum, Op, Program, Projection, Role, Weight, WeightId,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use support::group::{Group, cuda};
use support::tiny_model::{TinyModel, quantized};

/// Rows of the tables: the tokens there are.
const N_TOKENS: usize = 40;
/// Of the largest number of an output: f32 sums over a few hundred terms against f64 ones.
const F32_TOLERANCE: f64 = 5e-6;
/// Of the largest number of an output, where the cpu rounds activations to 8 bits in blocks of 32:
/// half a step is 1/254 of the block's largest; over a row the errors partly cancel.
const INT8_TOLERANCE: f64 = 1e-2;

/// Of the largest number of an output, where the CUDA kernels round activations to f16: half a step is
/// 1/4096 of a number, and errors partly cancel.
const F16_TOLERANCE: f64 = 5e-4;
/// Of the largest number of an output, where the CUDA kernels round activations to bf16 because more
/// than 8 tokens meet weights of bf16: half a step is 1/512 of a number, and errors partly cancel.
const BF16_TOLERANCE: f64 = 1e-2;

const FORMATS: [GgmlDType; 11] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// A checkpoint with random tensors `name` of `[rows, columns]` beside a tiny model.
struct Tensors {
    checkpoint: Checkpoint,
    shapes: Vec<(String, [usize; 2])>,
}

impl Tensors {
    fn new(seed: u64, format: GgmlDType, shapes: &[(&str, [usize; 2], Content)]) -> Self {
        println!("seed {seed}, {format:?}, {shapes:?}");
        let mut rng = StdRng::seed_from_u64(seed);
        let mut file = TinyModel::default().file();
        for &(name, [rows, columns], content) in shapes {
            let mut value = |i: usize| match content {
                Content::Identity => f32::from(u8::from(i / columns == i % columns)),
                Content::Table | Content::Matrix => rng.random_range(-1.0f32..1.0),
            };
            let values = (0..rows * columns).map(&mut value).collect();
            let format = if content == Content::Matrix { format } else { GgmlDType::F32 };
            file.tensors.push(quantized(name.to_owned(), values, rows, columns, format));
        }
        Self {
            checkpoint: Checkpoint::from_bytes(FileBytes::Owned(file.write().bytes)).unwrap(),
            shapes: shapes.iter().map(|&(name, shape, _)| (name.to_owned(), shape)).collect(),
        }
    }

    fn shape(&self, name: &str) -> [usize; 2] {
        self.shapes.iter().find(|(known, _)| known == name).unwrap().1
    }

    fn weight(&self, name: &str, rows: Range<usize>, columns: Range<usize>, role: Role) -> Weight {
        Weight { tensor: name.to_owned(), shape: self.shape(name), rows, columns, role }
    }

    /// A whole tensor of the file, as a weight of the program.
    fn whole(&self, program: &mut Program, name: &str, role: Role) -> WeightId {
        let [rows, columns] = self.shape(name);
        program.weight(self.weight(name, 0..rows, 0..columns, role))
    }

    /// A buffer with each token's row of a table.
    fn input(&self, program: &mut Program, buffer: &'static str, table: &str) -> BufferId {
        let [rows, columns] = self.shape(table);
        self.input_columns(program, buffer, table, 0..rows, 0..columns)
    }

    fn input_columns(
        &self,
        program: &mut Program,
        buffer: &'static str,
        table: &str,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> BufferId {
        let out = program.buffer(buffer, 1, columns.len());
        let table = program.weight(self.weight(table, rows, columns, Role::Table));
        program.op(Op::Embed { table, out });
        out
    }

    /// Makes the logits the numbers of a buffer.
    fn output(&self, program: &mut Program, buffer: BufferId, identity: &str) {
        let weight = self.whole(program, identity, Role::Matrix);
        program.vocab = 0..self.shape(identity)[0];
        program.op(Op::Head { input: buffer, weight });
    }

    /// A row of a tensor in f64, as the file's format holds it.
    fn row(&self, name: &str, row: usize) -> Vec<f64> {
        let [rows, columns] = self.shape(name);
        let weight = self.weight(name, 0..rows, 0..columns, Role::Matrix);
        let mut out = vec![0.0; columns];
        self.checkpoint.slice(&weight).unwrap().dequantized_row(row, &mut out);
        out.into_iter().map(f64::from).collect()
    }

    fn rows(&self, name: &str) -> Vec<Vec<f64>> {
        (0..self.shape(name)[0]).map(|row| self.row(name, row)).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Random, f32: looked up.
    Table,
    /// Random, in the format under test.
    Matrix,
    Identity,
}

/// What a program must answer: from a sequence's tokens to the numbers of each position.
type Expected<'a> = dyn Fn(&[u32]) -> Vec<Vec<f64>> + 'a;

/// Runs a program on every backend, several sequences at once, and compares.
fn check(
    tensors: &Tensors,
    n_ranks: usize,
    program: &(dyn Fn(usize) -> Program + Sync),
    expected: &Expected<'_>,
    format: GgmlDType,
) {
    let mut rng = StdRng::seed_from_u64(7);
    let width = (0..n_ranks).map(|rank| program(rank).vocab.len()).sum();
    let kv_format = KvFormat::F32;
    let kinds = [Kind::Reference, Kind::Cpu, cuda()];
    for (kind, tolerance) in kinds.map(|kind| (kind, tolerance(kind, format))) {
        // One token, few, and many: cards have kernels for each.
        for (lens, chunk, threads) in
            [(&[1][..], 1, 1), (&[3], 3, 1), (&[37, 20, 5], 16, 2), (&[33], 40, 2)]
        {
            let mut tokens =
                |len: &usize| (0..*len).map(|_| rng.random_range(0..N_TOKENS as u32)).collect();
            let sequences: Vec<Vec<u32>> = lens.iter().map(&mut tokens).collect();
            let sequences: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
            let group = Group {
                kind,
                shares: &vec![1; n_ranks],
                threads,
                chunk,
                kv_format,
                ..Group::default()
            };
            let got = group.run(&tensors.checkpoint, program, width, &sequences);
            for (sequence, got) in sequences.iter().zip(got) {
                let expected = expected(sequence).concat();
                assert_eq!(got.len(), expected.len());
                let largest = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
                assert!(largest > 1e-3, "an output of zeros shows nothing");
                let difference = |(&got, want): (&f32, &f64)| (f64::from(got) - want).abs();
                let worst = got.iter().zip(&expected).map(difference);
                let worst =
                    worst.fold(0.0, |max: f64, x| if x > max || x.is_nan() { x } else { max });
                assert!(
                    worst <= tolerance * largest,
                    "{kind:?}, {n_ranks} ranks, lengths {lens:?}, chunk {chunk}: off by {worst} of \
                     {largest}; the tolerance is {tolerance}"
                );
            }
        }
    }
}

fn has_int8_kernel(format: GgmlDType) -> bool {
    !matches!(format, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16)
}

/// Of a backend that multiplies with weights of a format.
fn tolerance(kind: Kind, format: GgmlDType) -> f64 {
    match kind {
        Kind::Cpu if has_int8_kernel(format) => INT8_TOLERANCE,
        Kind::Cuda(_) if has_int8_kernel(format) => F16_TOLERANCE,
        Kind::Cuda(_) if format == GgmlDType::BF16 => BF16_TOLERANCE,
        Kind::Reference | Kind::Cpu | Kind::Cuda(_) => F32_TOLERANCE,
    }
}

fn matmul(weight: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    weight.iter().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

#[test]
fn embed_looks_up_rows_of_every_format() {
    for format in FORMATS {
        let shapes =
            [("table", [N_TOKENS, 256], Content::Matrix), ("one", [256, 256], Content::Identity)];
        let tensors = Tensors::new(1, format, &shapes);
        let program = |_| {
            let mut program = Program::default();
            let out = tensors.input(&mut program, "out", "table");
            tensors.output(&mut program, out, "one");
            program
        };
        let expected = |tokens: &[u32]| {
            tokens.iter().map(|&token| tensors.row("table", token as usize)).collect()
        };
        check(&tensors, 1, &program, &expected, GgmlDType::F32);
    }
}

#[test]
fn a_table_split_over_ranks_sums_to_the_whole_row() {
    let shapes = [("table", [N_TOKENS, 96], Content::Table), ("one", [96, 96], Content::Identity)];
    let tensors = Tensors::new(2, GgmlDType::F32, &shapes);
    let bounds = [0, 7, 7, N_TOKENS];
    let program = |rank: usize| {
        let mut program = Program::default();
        let rows = bounds[rank]..bounds[rank + 1];
        let part = tensors.input_columns(&mut program, "part", "table", rows, 0..96);
        let out = program.buffer("out", 1, 96);
        let plan = program.reduce_plan(ReducePlan::any_order(3));
        program.op(Op::AllReduce { parts: part, plan, out });
        // The head is split too, unevenly: the second rank has no row of it.
        let rows = [0..64, 64..64, 64..96][rank].clone();
        program.vocab = rows.clone();
        let weight = program.weight(tensors.weight("one", rows, 0..96, Role::Matrix));
        program.op(Op::Head { input: out, weight });
        program
    };
    let expected =
        |tokens: &[u32]| tokens.iter().map(|&t| tensors.row("table", t as usize)).collect();
    check(&tensors, 3, &program, &expected, GgmlDType::F32);
}

#[test]
fn norm_adds_the_delta_to_the_residual_and_normalises() {
    let shapes = [
        ("a", [N_TOKENS, 160], Content::Table),
        ("b", [N_TOKENS, 160], Content::Table),
        ("scale", [1, 160], Content::Table),
        ("one", [160, 160], Content::Identity),
    ];
    let tensors = Tensors::new(3, GgmlDType::F32, &shapes);
    let eps = 1e-3;
    for (with_delta, read_residual) in [(false, false), (true, false), (true, true)] {
        let program = |_| {
            let mut program = Program::default();
            let residual = tensors.input(&mut program, "residual", "a");
            let delta = tensors.input(&mut program, "delta", "b");
            let weight = tensors.whole(&mut program, "scale", Role::Vector);
            let out = program.buffer("out", 1, 160);
            let delta = with_delta.then_some(delta);
            program.op(Op::Norm { residual, delta, weight, eps, out });
            tensors.output(&mut program, if read_residual { residual } else { out }, "one");
            program
        };
        let of_token = |&token: &u32| {
            let mut x = tensors.row("a", token as usize);
            if with_delta {
                x.iter_mut().zip(tensors.row("b", token as usize)).for_each(|(x, d)| *x += d);
            }
            if read_residual {
                return x;
            }
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let rms = (mean + f64::from(eps)).sqrt();
            x.iter().zip(tensors.row("scale", 0)).map(|(x, w)| x / rms * w).collect()
        };
        let expected = |tokens: &[u32]| tokens.iter().map(of_token).collect();
        check(&tensors, 1, &program, &expected, GgmlDType::F32);
    }
}

#[test]
fn linear_multiplies_with_several_weights_of_every_format() {
    for (seed, format) in (10..).zip(FORMATS) {
        let shapes = [
            ("x", [N_TOKENS, 256], Content::Table),
            ("w1", [37, 256], Content::Matrix),
            ("w2", [96, 256], Content::Matrix),
            ("one", [96, 96], Content::Identity),
        ];
        let tensors = Tensors::new(seed, format, &shapes);
        let program = |_| {
            let mut program = Program::default();
            let input = tensors.input(&mut program, "x", "x");
            let outs = [program.buffer("y1", 1, 37), program.buffer("y2", 1, 96)];
            let weights = ["w1", "w2"].map(|w| tensors.whole(&mut program, w, Role::Matrix));
            let projections = weights.into_iter().zip(outs);
            let projections = projections.map(|(weight, out)| Projection { weight, out }).collect();
            program.op(Op::Linear { input, projections });
            tensors.output(&mut program, outs[1], "one");
            program
        };
        let weight = tensors.rows("w2");
        let of_token = |&token: &u32| matmul(&weight, &tensors.row("x", token as usize));
        let expected = |tokens: &[u32]| tokens.iter().map(of_token).collect();
        check(&tensors, 1, &program, &expected, format);
    }
}

#[test]
fn head_multiplies_with_any_number_of_rows_of_every_format() {
    for (seed, format) in (70..).zip(FORMATS) {
        // 37 rows are no whole kernel tiles.
        let shapes = [("x", [N_TOKENS, 256], Content::Table), ("head", [37, 256], Content::Matrix)];
        let tensors = Tensors::new(seed, format, &shapes);
        let program = |_| {
            let mut program = Program::default();
            let input = tensors.input(&mut program, "x", "x");
            tensors.output(&mut program, input, "head");
            program
        };
        let weight = tensors.rows("head");
        let of_token = |&token: &u32| matmul(&weight, &tensors.row("x", token as usize));
        let expected = |tokens: &[u32]| tokens.iter().map(of_token).collect();
        check(&tensors, 1, &program, &expected, format);
    }
}

#[test]
fn column_slices_of_every_format_sum_to_the_whole_product() {
    const LEAF: usize = 32;
    for (seed, format) in (30..).zip(FORMATS) {
        let shapes = [
            ("x", [N_TOKENS, 512], Content::Table),
            ("w", [64, 512], Content::Matrix),
            ("one", [64, 64], Content::Identity),
        ];
        let tensors = Tensors::new(seed, format, &shapes);
        // Cuts inside the 256-column blocks of K-quants; the third rank holds nothing.
        let leaves = [0..3, 3..11, 11..11, 11..16];
        let tree = SumTree::balanced(16);
        let program = |rank: usize| {
            let mut program = Program::default();
            let plan = ReducePlan::new(&tree, &leaves);
            let mine = leaves[rank].clone();
            let columns = mine.start * LEAF..mine.end * LEAF;
            let parts = program.buffer("parts", plan.n_parts(rank), 64);
            let out = program.buffer("out", 1, 64);
            if !mine.is_empty() {
                let input =
                    tensors.input_columns(&mut program, "x", "x", 0..N_TOKENS, columns.clone());
                let weight = program.weight(tensors.weight("w", 0..64, columns, Role::Matrix));
                let of_rank = tree.parts(mine);
                let sum = LeafSum {
                    leaf_columns: LEAF,
                    part_leaves: of_rank.iter().map(ExactSizeIterator::len).collect(),
                    merges: of_rank.into_iter().flat_map(|part| tree.merges(part)).collect(),
                };
                program.op(Op::LinearParts { input, weight, sum, out: parts });
            }
            let plan = program.reduce_plan(plan);
            program.op(Op::AllReduce { parts, plan, out });
            if rank == 0 {
                tensors.output(&mut program, out, "one");
            } else {
                let weight = program.weight(tensors.weight("one", 0..0, 0..64, Role::Matrix));
                program.op(Op::Head { input: out, weight });
            }
            program
        };
        let weight = tensors.rows("w");
        let of_token = |&token: &u32| matmul(&weight, &tensors.row("x", token as usize));
        let expected = |tokens: &[u32]| tokens.iter().map(of_token).collect();
        check(&tensors, 4, &program, &expected, format);
    }
}

#[test]
fn silu_gate_is_silu_times_up() {
    let shapes = [
        ("gate", [N_TOKENS, 96], Content::Table),
        ("up", [N_TOKENS, 96], Content::Table),
        ("one", [96, 96], Content::Identity),
    ];
    let tensors = Tensors::new(4, GgmlDType::F32, &shapes);
    let program = |_| {
        let mut program = Program::default();
        let gate = tensors.input(&mut program, "gate", "gate");
        let up = tensors.input(&mut program, "up", "up");
        let out = program.buffer("out", 1, 96);
        program.op(Op::SiluGate { gate, up, out });
        tensors.output(&mut program, out, "one");
        program
    };
    let of_token = |&token: &u32| {
        let rows = ["gate", "up"].map(|name| tensors.row(name, token as usize));
        rows[0].iter().zip(&rows[1]).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
    };
    let expected = |tokens: &[u32]| tokens.iter().map(of_token).collect();
    check(&tensors, 1, &program, &expected, GgmlDType::F32);
}

/// Queries, keys and values of one layer.
struct Layer<'a> {
    tensors: &'a Tensors,
    head_dim: usize,
    kv_of_head: &'a [usize],
    rope: Rope,
    scale: f32,
}

impl Layer<'_> {
    fn rotated(&self, table: &str, token: u32, position: usize, head: usize) -> Vec<f64> {
        let row = self.tensors.row(table, token as usize);
        let mut x = row[head * self.head_dim..(head + 1) * self.head_dim].to_vec();
        let half = self.rope.dim / 2;
        for i in 0..half {
            let power = -2.0 * i as f64 / self.rope.dim as f64;
            let angle = position as f64 * f64::from(self.rope.theta).powf(power);
            let (a, b) = match self.rope.pairs {
                RopePairs::Adjacent => (2 * i, 2 * i + 1),
                RopePairs::Halves => (i, i + half),
            };
            let (x_a, x_b) = (x[a], x[b]);
            x[a] = x_a * angle.cos() - x_b * angle.sin();
            x[b] = x_a * angle.sin() + x_b * angle.cos();
        }
        x
    }

    /// Attention over the sequence up to each position, query heads side by side.
    fn expected(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let attend = |position: usize, (head, &kv_head): (usize, &usize)| {
            let q = self.rotated("q", tokens[position], position, head);
            let score = |at: usize| {
                let k = self.rotated("k", tokens[at], at, kv_head);
                f64::from(self.scale) * q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>()
            };
            let weights: Vec<f64> = (0..=position).map(|at| score(at).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut out = vec![0.0; self.head_dim];
            for (weight, &token) in weights.iter().zip(tokens) {
                let v = self.tensors.row("v", token as usize);
                let v = &v[kv_head * self.head_dim..(kv_head + 1) * self.head_dim];
                out.iter_mut().zip(v).for_each(|(out, v)| *out += weight / sum * v);
            }
            out
        };
        (0..tokens.len())
            .map(|position| {
                let heads = self.kv_of_head.iter().enumerate();
                heads.flat_map(|head| attend(position, head)).collect()
            })
            .collect()
    }

    /// Two layers in the cache; the second is read. The first holds other numbers.
    fn program(&self, n_kv_heads: usize) -> Program {
        let (tensors, columns) = (self.tensors, self.kv_of_head.len() * self.head_dim);
        let mut program =
            Program { n_layers: 2, n_kv_heads, head_dim: self.head_dim, ..Program::default() };
        let rope = self.rope;
        let other_q = tensors.input(&mut program, "other q", "q");
        let other_v = tensors.input(&mut program, "other v", "k");
        let other_k = tensors.input(&mut program, "other k", "v");
        let (q, k, v) = (other_q, other_k, other_v);
        program.op(Op::RopeKv { q, k, v, layer: 0, rope });
        let q = tensors.input(&mut program, "q", "q");
        let k = tensors.input(&mut program, "k", "k");
        let v = tensors.input(&mut program, "v", "v");
        program.op(Op::RopeKv { q, k, v, layer: 1, rope });
        let out = program.buffer("out", 1, columns);
        let kv_of_head = self.kv_of_head.to_vec();
        program.op(Op::Attention { q, layer: 1, kv_of_head, scale: self.scale, out });
        tensors.output(&mut program, out, "one");
        program
    }
}

#[test]
fn attention_reads_rotated_keys_of_its_own_sequence_through_the_block_tables() {
    let cases = [
        (64, 64, RopePairs::Adjacent, &[0, 0, 0, 1, 1, 1][..]),
        (64, 64, RopePairs::Halves, &[0, 1]),
        (32, 16, RopePairs::Halves, &[0, 0, 1]),
        (32, 8, RopePairs::Adjacent, &[1, 1]),
        (128, 128, RopePairs::Adjacent, &[0]),
    ];
    for (seed, (head_dim, dim, pairs, kv_of_head)) in (50..).zip(cases) {
        let n_kv_heads = kv_of_head.iter().max().unwrap() + 1;
        let (q, kv) = (kv_of_head.len() * head_dim, n_kv_heads * head_dim);
        let shapes = [
            ("q", [N_TOKENS, q], Content::Table),
            ("k", [N_TOKENS, kv], Content::Table),
            ("v", [N_TOKENS, kv], Content::Table),
            ("one", [q, q], Content::Identity),
        ];
        let tensors = Tensors::new(seed, GgmlDType::F32, &shapes);
        let rope = Rope { theta: 100.0, dim, pairs };
        let layer = Layer { tensors: &tensors, head_dim, kv_of_head, rope, scale: 0.3 };
        let expected = |tokens: &[u32]| layer.expected(tokens);
        check(&tensors, 1, &|_| layer.program(n_kv_heads), &expected, GgmlDType::F32);
    }
}
