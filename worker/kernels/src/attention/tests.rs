//! Attention against a plain computation, and its bits against themselves.

#![allow(clippy::unwrap_used)]

use super::*;
use half::f16;

const KV_OF_HEAD: [usize; 5] = [0, 0, 0, 1, 1];
const N_KV_HEADS: usize = 2;
const SCALE: f32 = 0.25;

fn noise(seed: usize, n: usize) -> Vec<f32> {
    let mut x = (seed as u32).wrapping_mul(2_654_435_761) | 1;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            (x % 2001) as f32 / 1000.0 - 1.0
        })
        .collect()
}

/// Sequences in scattered blocks of one cache.
struct Case {
    format: Format,
    head_dim: usize,
    lens: Vec<usize>,
    tables: Vec<Vec<u32>>,
    cache: KvCache,
}

impl Case {
    fn new(isa: Isa, format: Format, head_dim: usize, lens: &[usize]) -> Self {
        let n_blocks: usize = lens.iter().map(|len| len.div_ceil(BLOCK_LEN)).sum();
        // Every block once, from all over.
        let mut ids = (0..n_blocks as u32).map(|i| i.reverse_bits()).collect::<Vec<_>>();
        ids.sort_unstable();
        let mut ids = ids.into_iter().map(u32::reverse_bits);
        let tables: Vec<Vec<u32>> =
            lens.iter().map(|len| ids.by_ref().take(len.div_ceil(BLOCK_LEN)).collect()).collect();
        let mut cache = KvCache::new(format, n_blocks, N_KV_HEADS, head_dim).unwrap();
        let mut alone = Pool::new(1, false);
        for (s, table) in tables.iter().enumerate() {
            for p in 0..lens[s] {
                let slot = table[p / BLOCK_LEN] as usize * BLOCK_LEN + p % BLOCK_LEN;
                let [k, v] = key_and_value(s, p, head_dim);
                cache.write(&mut alone, isa, &[slot as u32], &k, &v);
            }
        }
        Self { format, head_dim, lens: lens.to_vec(), tables, cache }
    }

    /// Rows of sequences: (sequence, first position, rows).
    fn attend(&self, isa: Isa, n_threads: usize, rows: &[(usize, usize, usize)]) -> Vec<Vec<f32>> {
        let width = KV_OF_HEAD.len() * self.head_dim;
        let (mut spans, mut block_tables, mut q) = (Vec::new(), Vec::new(), Vec::new());
        for &(s, first_position, n_rows) in rows {
            let (first_row, first_block) = (q.len() / width, block_tables.len());
            spans.push(Span { first_row, n_rows, first_position, first_block });
            block_tables.extend(&self.tables[s]);
            (first_position..first_position + n_rows).for_each(|p| q.extend(query(s, p, width)));
        }
        let mut out = vec![f32::NAN; q.len()];
        let longest = self.lens.iter().copied().max().unwrap();
        attend(
            &mut Pool::new(n_threads, false),
            isa,
            &self.cache,
            Heads { kv_of_head: &KV_OF_HEAD, head_dim: self.head_dim, scale: SCALE },
            Rows { spans: &spans, block_tables: &block_tables },
            &q,
            &mut out,
            &mut Scratch::new(n_threads, longest, self.head_dim),
        );
        let part = |span: &Span| out[span.first_row * width..][..span.n_rows * width].to_vec();
        spans.iter().map(part).collect()
    }
}

fn key_and_value(sequence: usize, position: usize, head_dim: usize) -> [Vec<f32>; 2] {
    let seed = 10_000 * sequence + position;
    [1, 2].map(|part| noise(3 * seed + part, N_KV_HEADS * head_dim))
}

fn query(sequence: usize, position: usize, width: usize) -> Vec<f32> {
    noise(1_000_003 + 10_000 * sequence + position, width)
}

/// A row as the format keeps it.
fn kept(format: Format, row: &[f32]) -> Vec<f64> {
    let largest = row.iter().fold(0f32, |a, &b| a.max(b.abs()));
    let (scale, inverse) = (largest / 127.0, 127.0 / largest);
    row.iter()
        .map(|&x| match format {
            Format::F32 => f64::from(x),
            Format::F16 => f64::from(f16::from_f32(x)),
            Format::Int8 => f64::from((x * inverse).round_ties_even() * scale),
        })
        .collect()
}

/// One head of one row, in f64.
fn plain(case: &Case, sequence: usize, position: usize, head: usize) -> Vec<f64> {
    let (d, kv_head) = (case.head_dim, KV_OF_HEAD[head]);
    let q = &query(sequence, position, KV_OF_HEAD.len() * d)[head * d..][..d];
    let mut weights = Vec::new();
    let mut values = Vec::new();
    for p in 0..=position {
        let [k, v] =
            key_and_value(sequence, p, d).map(|x| kept(case.format, &x[kv_head * d..][..d]));
        let dot: f64 = q.iter().zip(&k).map(|(q, k)| f64::from(q * SCALE) * k).sum();
        weights.push(dot.exp());
        values.push(v);
    }
    let total: f64 = weights.iter().sum();
    let value = |c: usize| values.iter().zip(&weights).map(|(v, w)| w * v[c]).sum::<f64>() / total;
    (0..d).map(value).collect()
}

#[test]
fn attention_matches_a_plain_computation_in_f64() {
    for format in Format::ALL {
        for head_dim in [32, 64, 96, 128] {
            let case = Case::new(Isa::detect(), format, head_dim, &[300, 37]);
            let out = case.attend(Isa::detect(), 2, &[(0, 0, 300), (1, 30, 7)]);
            let rows = [0, 1, 15, 16, 255, 256, 299].map(|p| (0, p, p));
            for (s, p, row) in rows.into_iter().chain([(1, 30, 0), (1, 36, 6)]) {
                for head in 0..KV_OF_HEAD.len() {
                    let at = (row * KV_OF_HEAD.len() + head) * head_dim;
                    let got = &out[s][at..at + head_dim];
                    for (got, want) in got.iter().zip(plain(&case, s, p, head)) {
                        let difference = (f64::from(*got) - want).abs();
                        assert!(difference < 1e-5, "{format:?} {head_dim} {s} {p}: {got} {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_query_gets_the_same_bits_in_any_batch_on_any_threads_and_instruction_set() {
    let bits = |rows: &[f32]| rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let lens = [1300, 300, 20];
    for format in Format::ALL {
        for head_dim in [32, 160] {
            let width = KV_OF_HEAD.len() * head_dim;
            let want = Case::new(Isa::detect(), format, head_dim, &lens);
            let whole = want.attend(Isa::detect(), 1, &[(0, 0, 1300), (1, 0, 300), (2, 0, 20)]);
            for isa in Isa::available() {
                let case = Case::new(isa, format, head_dim, &lens);
                for rows in [
                    &[(0, 1299, 1)][..],
                    &[(0, 1274, 20), (1, 299, 1), (2, 0, 1)],
                    &[(2, 19, 1), (1, 200, 100), (0, 1278, 3)],
                    &[(1, 255, 2), (0, 1279, 1), (0, 1281, 1)],
                ] {
                    for n_threads in [1, 3] {
                        let got = case.attend(isa, n_threads, rows);
                        for (&(s, first, n), got) in rows.iter().zip(got) {
                            let want = &whole[s][first * width..(first + n) * width];
                            let what = "other bits";
                            assert!(
                                bits(&got) == bits(want),
                                "{what}: {isa:?} {format:?} {head_dim} {n_threads} threads {rows:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn what_a_block_held_before_does_not_matter() {
    for format in Format::ALL {
        let mut case = Case::new(Isa::detect(), format, 32, &[20]);
        let want = case.attend(Isa::detect(), 1, &[(0, 17, 1)]);
        let width = N_KV_HEADS * 32;
        let slot = |p: usize| case.tables[0][p / BLOCK_LEN] as usize * BLOCK_LEN + p % BLOCK_LEN;
        let slots = [18, 19, 31].map(|p| slot(p) as u32);
        let nan = vec![f32::NAN; slots.len() * width];
        case.cache.write(&mut Pool::new(1, false), Isa::detect(), &slots, &nan, &nan);
        assert_eq!(case.attend(Isa::detect(), 1, &[(0, 17, 1)]), want, "{format:?}");
    }
}

#[test]
fn numbers_beyond_the_format_saturate_and_rows_of_zeros_stay_zeros() {
    for format in Format::ALL {
        for (value, expect) in [(1e6, 65504.0), (-1e6, -65504.0), (0.0, 0.0), (1e-45, 0.0)] {
            let mut cache = KvCache::new(format, 1, N_KV_HEADS, 32).unwrap();
            let row = vec![value; N_KV_HEADS * 32];
            cache.write(&mut Pool::new(1, false), Isa::detect(), &[0], &row, &row);
            let q: Vec<f32> = vec![0.0; KV_OF_HEAD.len() * 32];
            let mut out = q.clone();
            attend(
                &mut Pool::new(1, false),
                Isa::detect(),
                &cache,
                Heads { kv_of_head: &KV_OF_HEAD, head_dim: 32, scale: 1.0 },
                Rows {
                    spans: &[Span { first_row: 0, n_rows: 1, first_position: 0, first_block: 0 }],
                    block_tables: &[0],
                },
                &q,
                &mut out,
                &mut Scratch::new(1, 1, 32),
            );
            let expect = if format == Format::F16 { expect } else { value };
            let near = |x: &f32| (x - expect).abs() <= expect.abs() * 1e-6 + 1e-44;
            assert!(out.iter().all(near), "{format:?} {value}: {}", out[0]);
        }
    }
}

#[test]
fn a_cache_does_not_depend_on_who_writes_its_rows() {
    for format in Format::ALL {
        let (n_rows, width) = (40, N_KV_HEADS * 96);
        let slots: Vec<u32> = (0..n_rows as u32).map(|i| (i * 7) % 48).collect();
        let (k, v) = (noise(1, n_rows * width), noise(2, n_rows * width));
        let attended = |n_threads: usize, at_a_time: usize| {
            let mut cache = KvCache::new(format, 3, N_KV_HEADS, 96).unwrap();
            let mut pool = Pool::new(n_threads, false);
            for (i, slots) in slots.chunks(at_a_time).enumerate() {
                let numbers = i * at_a_time * width..(i * at_a_time + slots.len()) * width;
                cache.write(&mut pool, Isa::detect(), slots, &k[numbers.clone()], &v[numbers]);
            }
            let q = noise(3, KV_OF_HEAD.len() * 96);
            let mut out = vec![f32::NAN; q.len()];
            attend(
                &mut pool,
                Isa::detect(),
                &cache,
                Heads { kv_of_head: &KV_OF_HEAD, head_dim: 96, scale: SCALE },
                Rows {
                    spans: &[Span { first_row: 0, n_rows: 1, first_position: 47, first_block: 0 }],
                    block_tables: &[2, 0, 1],
                },
                &q,
                &mut out,
                &mut Scratch::new(n_threads, 48, 96),
            );
            out
        };
        let want = attended(1, 1);
        assert!(want.iter().all(|x| x.is_finite()) && want.iter().any(|&x| x != 0.0));
        assert_eq!(attended(3, n_rows), want, "{format:?}");
    }
}
