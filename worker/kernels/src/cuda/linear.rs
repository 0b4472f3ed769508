//! Multiplying activations with weights, and looking up rows of a table.

use super::activations::{self, Activations, Forms, Making, Normed, STEP_COLUMNS, TOKEN_TILE};
use super::device::Gemm;
use super::kernels::{self, FEW_THREADS, Linear, MANY_THREADS, PACK_THREADS, PACK_WARPS};
use super::launch::{Arguments, Geometry, Kernel, Words};
use super::matrix::{Matrix, STEP, Weights};
use super::memory::Buffer;
use super::rows::{assert_together, launch};
use super::{Device, Error, View};
use crate::matrix::TILE_ROWS;
use crate::quant::blocks::RUN;

/// Up to so many tokens a block takes one tile of tokens, beyond four.
const FEW_TOKENS: usize = TOKEN_TILE;
/// Up to so many tokens meet integers as bytes.
const BYTE_TOKENS: usize = TOKEN_TILE / 2;
const MANY_TOKENS: usize = 4 * TOKEN_TILE;
/// The most tokens that kernels of this crate take where cublasLt could: with weights of bf16, which
/// it takes as they are, and with others, which are first turned to bf16.
const MOST_DENSE_TOKENS: usize = 8;
const MOST_OTHER_TOKENS: usize = 48;
/// Floats of a warp's ring, of one token and of more, and of a step at most: of eight bits (`stream.cu`,
/// `quantised.cu`).
const ONE_RING: usize = 4 * 408;
const RING: usize = 4 * 288;
const STAGE: usize = 4 * 136;
/// Blocks that a multiprocessor has room for, of few tokens and of many.
const FEW_BLOCKS: usize = 2;
const MANY_BLOCKS: usize = 2;
/// Steps of a row that a warp norms at most, and floats that a block adds up in meanwhile (`stream.cu`).
const NORMED_STEPS: usize = 3;
const NORM_PLACE: usize = 16;
/// Matrices that one launch takes.
const MOST_MATRICES: usize = 3;

/// How a matrix's columns are summed: in ranges, each a product of its own.
#[derive(Debug)]
pub struct Parts {
    /// In runs of 32 columns: where each begins, and where the last ends.
    bounds: Vec<usize>,
    on_device: Buffer<u32>,
}

impl Parts {
    /// Parts of so many columns each, multiples of 32.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// If columns are no whole runs.
    pub fn new(device: &Device, columns: impl IntoIterator<Item = usize>) -> Result<Self, Error> {
        let mut bounds = vec![0];
        for columns in columns {
            assert!(columns.is_multiple_of(RUN), "{columns} columns are no whole runs");
            bounds.push(bounds[bounds.len() - 1] + columns / RUN);
        }
        let words: Vec<u32> = bounds.iter().map(|&bound| bound as u32).collect();
        Ok(Self { on_device: device.holding(&words)?, bounds })
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.bounds.len() - 1
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn n_columns(&self) -> usize {
        self.bounds[self.bounds.len() - 1] * RUN
    }
}

/// One weight of a linear op.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    pub weight: &'a Matrix,
    pub parts: &'a Parts,
    /// `[parts, tokens, weight.rows()]`
    pub out: &'a Buffer<f32>,
    /// Whether the product is added to what `out` holds; of one part only.
    pub adds: bool,
}

/// Which kernel multiplies.
#[derive(Debug, Clone, Copy)]
pub(super) enum Route {
    /// Tensor cores, bytes of integer weights with bytes of activations.
    Bytes(Kernel),
    /// Tensor cores, activations in f16, integer weights or those of FP8 as they are.
    Halves(Kernel),
    /// Tensor cores, weights of bf16 and activations in two.
    Dense(Kernel),
    /// cublasLt, all in bf16.
    Gemm,
    /// A warp for each row and token.
    Plain(Kernel),
}

pub(super) fn route(matrix: &Matrix, n_tokens: usize, device: &Device) -> Route {
    let is_many = |most| n_tokens > most && device.driver().has_gemm();
    let (weights, linear) = (&matrix.weights, kernels::of_format(matrix.format).linear);
    let is_gemm = match weights {
        Weights::Quantised(_) | Weights::Fp8(_) => is_many(MOST_OTHER_TOKENS),
        Weights::Halves(_) => is_many(MOST_DENSE_TOKENS),
        Weights::Floats(_) => false,
    };
    match linear {
        Linear::Plain(kernel) => Route::Plain(kernel),
        Linear::Tiles { .. } if is_gemm => Route::Gemm,
        Linear::Tiles { one, four, few, many, .. } => {
            let kernel = match (n_tokens, four) {
                (..=1, _) => one,
                (..=BYTE_TOKENS, Some(four)) => four,
                (..=FEW_TOKENS, _) => few,
                _ => many,
            };
            match weights {
                Weights::Quantised(_) if n_tokens <= BYTE_TOKENS => Route::Bytes(kernel),
                Weights::Quantised(_) | Weights::Fp8(_) => Route::Halves(kernel),
                Weights::Halves(_) => Route::Dense(kernel),
                Weights::Floats(_) => unreachable!("f32 has no tiles"),
            }
        }
    }
}

/// What products of one step need beside activations.
#[derive(Debug)]
pub struct Scratch {
    /// Weights on their way to cublasLt.
    bf16: Buffer<u16>,
}

impl Scratch {
    /// bf16 numbers that are made at once, if there are so many: they stay in a card's cache.
    const MOST: usize = 16 << 20;

    /// For matrices of at most so many columns.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(device: &Device, columns: usize) -> Result<Self, Error> {
        Ok(Self { bf16: device.buffer(Self::len(columns))? })
    }

    /// Numbers of it.
    #[must_use]
    pub fn len(columns: usize) -> usize {
        Self::MOST.max(TILE_ROWS * columns)
    }
}

/// `out[part] = input * weight^T` over the part's columns, for several weights on one input
/// `[n_tokens, columns]`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree.
pub fn linear(
    input: &Buffer<f32>,
    columns: usize,
    n_tokens: usize,
    activations: &Activations,
    scratch: &Scratch,
    projections: &[Projection<'_>],
) -> Result<(), Error> {
    let weights = projections.iter().map(|one| one.weight);
    let forms = Forms::read_by(weights, n_tokens, input.device());
    let made = Making { activations, forms, plain: input, columns, n_tokens, normed: None };
    if forms != Forms::PLAIN {
        activations::plain(input, None, made.without_plain())?;
    }
    multiply(made, scratch, projections)
}

/// Whether products of so many tokens with all of these weights can norm their input by themselves.
#[must_use]
pub fn takes_normed<'a>(
    weights: impl IntoIterator<Item = &'a Matrix>,
    n_tokens: usize,
    device: &Device,
) -> bool {
    let takes = |weight: &Matrix| {
        let has_tiles = !matches!(route(weight, n_tokens, device), Route::Plain(_));
        let n_steps = weight.columns.div_ceil(STEP_COLUMNS);
        let most = Geometry::MOST_SHARED / 4 - shared_floats(1);
        has_tiles
            && n_steps <= NORMED_STEPS * FEW_THREADS / 32
            && normed_floats(weight.columns) <= most
    };
    n_tokens == 1 && weights.into_iter().all(takes)
}

/// What a block shares: a ring a warp, and a place for adding up what the warps have.
const fn shared_floats(n_tokens: usize) -> usize {
    let n_warps = if n_tokens <= FEW_TOKENS { FEW_THREADS } else { MANY_THREADS } / 32;
    n_warps * (if n_tokens <= 1 { ONE_RING } else { RING } + TOKEN_TILE * TILE_ROWS)
}

/// What a block that norms shares beside it, at most: of bf16, two numbers a column.
const fn normed_floats(columns: usize) -> usize {
    NORM_PLACE + columns.next_multiple_of(STEP_COLUMNS)
}

/// As [`linear`], of activations that were made.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree, or not all forms were made.
pub fn multiply(
    made: Making<'_>,
    scratch: &Scratch,
    projections: &[Projection<'_>],
) -> Result<(), Error> {
    let Making { plain: input, columns, n_tokens, .. } = made;
    let device = input.device();
    for projection in projections {
        let Projection { weight, parts, out, adds } = *projection;
        assert!(!adds || parts.len() == 1, "sums of parts that are added to");
        assert_eq!(weight.columns, columns, "weights of other columns");
        assert!(parts.n_columns() <= columns, "parts beyond the columns");
        assert!(out.len() >= parts.len() * n_tokens * weight.rows, "an output too small");
        assert_together(out, input);
    }
    let weights = || projections.iter().map(|one| one.weight);
    if let Some(normed) = made.normed {
        assert!(takes_normed(weights(), n_tokens, device), "weights that take nothing to norm");
        assert!(normed.row.len() >= columns && normed.weight.len() == columns);
        assert_together(normed.row, input);
    } else {
        let forms = Forms::read_by(weights(), n_tokens, device);
        assert!(made.forms.has(forms), "activations of other forms");
    }
    let mut rest = if n_tokens == 0 { &[][..] } else { projections };
    while let Some(first) = rest.first() {
        let kernel = route(first.weight, n_tokens, device);
        let goes_along = |one: &&Projection<'_>| {
            let is_alike = one.weight.format == first.weight.format && one.adds == first.adds;
            is_alike && std::ptr::eq(one.parts, first.parts)
        };
        let n_alike = rest.iter().take(MOST_MATRICES).take_while(goes_along).count();
        let n = match kernel {
            Route::Bytes(kernel) | Route::Halves(kernel) | Route::Dense(kernel) => {
                tiles(made, kernel, &rest[..n_alike])?;
                n_alike
            }
            Route::Gemm => {
                gemms(made, scratch, *first)?;
                1
            }
            Route::Plain(kernel) => {
                plain(made, kernel, *first)?;
                1
            }
        };
        rest = &rest[n..];
    }
    Ok(())
}

/// `Several` of the kernels: of each matrix up to six words, where it goes, half a word for the tiles'
/// beginnings and number, and whether they add.
struct Several {
    words: [u64; MOST_MATRICES * 7 + 3],
    n: usize,
    n_tiles: usize,
}

impl Words for Several {
    fn words(&self) -> &[u64] {
        &self.words[..self.n]
    }
}

impl Several {
    fn of(projections: &[Projection<'_>]) -> Self {
        let mut several = Self { words: [0; MOST_MATRICES * 7 + 3], n: 0, n_tiles: 0 };
        let (mut firsts, mut width) = ([u32::MAX; MOST_MATRICES + 1], 0);
        for (i, projection) in projections.iter().enumerate() {
            let Matrix { rows, columns, weights, .. } = projection.weight;
            let dense;
            let words: &[u64] = match weights {
                Weights::Quantised(quantised) => &quantised.argument,
                Weights::Fp8(fp8) => &fp8.argument,
                Weights::Halves(numbers) => {
                    dense = [numbers.address(), *rows as u64 | ((columns / RUN) as u64) << 32];
                    &dense
                }
                Weights::Floats(_) => unreachable!("f32 has no tiles"),
            };
            width = words.len();
            several.words[i * width..][..width].copy_from_slice(words);
            firsts[i] = several.n_tiles as u32;
            several.n_tiles += rows.div_ceil(TILE_ROWS);
        }
        firsts[MOST_MATRICES] = several.n_tiles as u32;
        let outs = &mut several.words[MOST_MATRICES * width..];
        for (to, projection) in outs.iter_mut().zip(projections) {
            *to = projection.out.address();
        }
        for (to, two) in outs[MOST_MATRICES..].iter_mut().zip(firsts.as_chunks::<2>().0) {
            *to = u64::from(two[0]) | u64::from(two[1]) << 32;
        }
        several.n = MOST_MATRICES * (width + 1) + 3;
        several.words[several.n - 1] = projections[0].adds.into();
        several
    }
}

/// `Normed` of the kernels: nothing, or a row, its weights, and the number that keeps zeros finite.
struct NormedWords([u64; 3]);

impl Words for NormedWords {
    fn words(&self) -> &[u64] {
        &self.0
    }
}

/// Matrices of one format and the same parts.
fn tiles(made: Making<'_>, kernel: Kernel, projections: &[Projection<'_>]) -> Result<(), Error> {
    let (several, parts) = (Several::of(projections), projections[0].parts);
    let normed = made.normed.map_or([0; 3], |Normed { row, weight, eps }| {
        [row.address(), weight.address(), eps.to_bits().into()]
    });
    let mut arguments = Arguments::new()
        .structure(&several)
        .structure(&made.made())
        .memory(&parts.on_device)
        .number(made.n_tokens);
    if made.n_tokens <= 1 {
        arguments = arguments.structure(&NormedWords(normed));
    }
    let device = projections[0].out.device();
    let n_multiprocessors = device.driver().n_multiprocessors();
    let mut geometry = tile_grid(several.n_tiles, made.n_tokens, parts.len(), n_multiprocessors);
    if made.normed.is_some() {
        geometry = geometry.shared_floats(shared_floats(1) + normed_floats(made.columns));
    }
    // SAFETY: planes of the weights' own shapes, rows of bf16 padded to whole tiles; activations of
    // their columns, made or to be made of a row of them; outputs of the asserted sizes.
    unsafe { launch(device, kernel, geometry, arguments) }
}

/// Blocks of a kernel on tensor cores: as many for the tiles as there is room for side by side.
fn tile_grid(
    n_tiles: usize,
    n_tokens: usize,
    n_parts: usize,
    n_multiprocessors: usize,
) -> Geometry {
    let (of_block, n_blocks) = match n_tokens <= FEW_TOKENS {
        true => (FEW_TOKENS, FEW_BLOCKS),
        false => (MANY_TOKENS, MANY_BLOCKS),
    };
    let n_groups = n_tokens.div_ceil(of_block);
    let n_sharing = (n_blocks * n_multiprocessors).div_ceil((n_groups * n_parts).max(1));
    let geometry = Geometry::new(n_tiles.min(n_sharing), n_groups, n_parts);
    geometry.shared_floats(shared_floats(n_tokens))
}

fn plain(made: Making<'_>, kernel: Kernel, projection: Projection<'_>) -> Result<(), Error> {
    let Projection { weight, parts, out, adds } = projection;
    let arguments = match &weight.weights {
        Weights::Halves(numbers) => Arguments::new().memory(numbers),
        Weights::Floats(numbers) => Arguments::new().memory(numbers),
        Weights::Quantised(_) | Weights::Fp8(_) => unreachable!("these have tiles"),
    };
    let arguments = arguments
        .memory(made.plain)
        .memory(&parts.on_device)
        .memory(out)
        .number(weight.rows)
        .number(weight.columns)
        .number(made.n_tokens)
        .number(adds.into());
    let geometry = Geometry::new(weight.rows.div_ceil(PACK_WARPS), made.n_tokens, parts.len());
    // SAFETY: `[rows, columns]` of the kernel's number; an input and an output as asserted.
    unsafe { launch(out.device(), kernel, geometry, arguments) }
}

/// By cublasLt; what is not bf16 some rows at a time, which are turned to bf16 first.
fn gemms(made: Making<'_>, scratch: &Scratch, projection: Projection<'_>) -> Result<(), Error> {
    let weight = projection.weight;
    if let Weights::Halves(numbers) = &weight.weights {
        return gemm(made, numbers.address(), 0..weight.rows, projection);
    }
    // As many chunks as there must be, all alike.
    let most = scratch.bf16.len() / weight.columns / TILE_ROWS * TILE_ROWS;
    let n_chunks = weight.rows.div_ceil(most).max(1);
    let chunk = weight.rows.div_ceil(n_chunks).next_multiple_of(TILE_ROWS);
    for first in (0..weight.rows).step_by(chunk) {
        let rows = first..weight.rows.min(first + chunk);
        to_bf16(weight, rows.clone(), &scratch.bf16)?;
        gemm(made, scratch.bf16.address(), rows, projection)?;
    }
    Ok(())
}

/// Of `rows`, which begin with a tile.
fn to_bf16(weight: &Matrix, rows: std::ops::Range<usize>, to: &Buffer<u16>) -> Result<(), Error> {
    let Linear::Tiles { to_bf16: Some(kernel), .. } = kernels::of_format(weight.format).linear
    else {
        unreachable!("integers and FP8 can be turned to bf16")
    };
    let (arguments, geometry) = match &weight.weights {
        Weights::Quantised(quantised) => {
            let n_steps = (weight.columns / RUN).div_ceil(STEP);
            let n_tiles = rows.len().div_ceil(TILE_ROWS);
            let geometry = Geometry::new(n_steps.div_ceil(PACK_WARPS), n_tiles, 1);
            let arguments = Arguments::new().structure(quantised).memory(to);
            (arguments.number(rows.start / TILE_ROWS), geometry.shared_floats(PACK_WARPS * STAGE))
        }
        Weights::Fp8(fp8) => {
            let n_blocks = (weight.columns / 4).div_ceil(PACK_THREADS);
            let arguments = Arguments::new().structure(fp8).memory(to);
            (arguments.number(rows.start), Geometry::new(n_blocks, rows.len(), 1))
        }
        Weights::Halves(_) | Weights::Floats(_) => unreachable!("as said"),
    };
    // SAFETY: rows of the weight, of integers whole tiles, for which the caller has room.
    unsafe { launch(to.device(), kernel, geometry, arguments) }
}

/// Of `rows`, which lie at `w`.
fn gemm(
    made: Making<'_>,
    w: u64,
    rows: std::ops::Range<usize>,
    projection: Projection<'_>,
) -> Result<(), Error> {
    let Projection { weight, parts, out, adds } = projection;
    for (part, bounds) in parts.bounds.windows(2).enumerate() {
        let first = (2 * bounds[0] * RUN) as u64;
        let gemm = Gemm {
            w: w + first,
            x: made.activations.first.address() + first,
            out: out.address() + (4 * (part * made.n_tokens * weight.rows + rows.start)) as u64,
            rows: rows.len(),
            tokens: made.n_tokens,
            columns: (bounds[1] - bounds[0]) * RUN,
            w_stride: weight.columns,
            x_stride: weight.columns,
            out_stride: weight.rows,
            adds,
        };
        if !rows.is_empty() {
            // SAFETY: columns of the part within rows of both; an output as asserted.
            unsafe { out.device().driver().gemm(&gemm) }?;
        }
    }
    Ok(())
}

/// `out[i] = table[tokens[i] - first_row]`, or zeros where the table does not hold the row.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If `out` is too small, or the table is kept in FP8.
pub fn embed(
    table: &Matrix,
    first_row: usize,
    tokens: View<'_, u32>,
    out: &Buffer<f32>,
) -> Result<(), Error> {
    assert!(out.len() >= tokens.len * table.columns);
    let (n_shares, arguments) = match &table.weights {
        Weights::Quantised(quantised) => (
            (table.columns / RUN).div_ceil(STEP).div_ceil(PACK_WARPS),
            Arguments::new().structure(quantised).view(tokens).memory(out).number(first_row),
        ),
        Weights::Halves(numbers) => {
            (1, dense_table(Arguments::new().memory(numbers), table, first_row, tokens, out))
        }
        Weights::Floats(numbers) => {
            (1, dense_table(Arguments::new().memory(numbers), table, first_row, tokens, out))
        }
        Weights::Fp8(_) => unreachable!("no table is kept in FP8"),
    };
    let kernel = kernels::of_format(table.format).embed.expect("tables have one");
    let geometry = Geometry::new(tokens.len, n_shares, 1).shared_floats(PACK_WARPS * STAGE);
    // SAFETY: blocks of a token; the kernel looks at no row that the table does not hold.
    unsafe { launch(out.device(), kernel, geometry, arguments) }
}

fn dense_table(
    arguments: Arguments,
    table: &Matrix,
    first_row: usize,
    tokens: View<'_, u32>,
    out: &Buffer<f32>,
) -> Arguments {
    arguments.view(tokens).memory(out).number(first_row).number(table.rows).number(table.columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_tiles_tokens_and_parts() {
        for (n_tiles, n_tokens, n_parts, n_warps, ring, grid) in [
            (256, 1, 1, 12, 408, [256, 1, 1]),
            (257, 8, 2, 12, 288, [132, 1, 2]),
            (1, 9, 1, 8, 288, [1, 1, 1]),
            (100, 33, 3, 8, 288, [44, 2, 3]),
            (0, 5, 1, 12, 288, [0, 1, 1]),
        ] {
            let geometry = tile_grid(n_tiles, n_tokens, n_parts, 132);
            assert_eq!(geometry.grid, grid, "{n_tiles} {n_tokens} {n_parts}");
            assert_eq!(geometry.shared_bytes, n_warps * (ring * 16 + 8 * 16 * 4));
        }
    }
}
