//! Multiplying activations with weights, and looking up rows of a table.

use super::device::Gemm;
use super::kernels::{self, LINEAR_THREADS, Linear, WARPS};
use super::launch::{Arguments, Geometry, Kernel};
use super::matrix::{Matrix, Weights};
use super::memory::Buffer;
use super::rows::{assert_together, launch};
use super::{Device, Error, View};
use crate::matrix::TILE_ROWS;
use crate::quant::Format;

/// Columns of a run.
const RUN: usize = 32;
/// Tokens of a tensor core's tile.
const TOKEN_TILE: usize = 8;
/// Up to so many tokens a block takes one such tile, beyond four.
const FEW_TOKENS: usize = TOKEN_TILE;
const MANY_TOKENS: usize = 4 * TOKEN_TILE;

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

/// Activations as kernels multiply them: made once for all weights that share them.
#[derive(Debug)]
pub struct Activations {
    max_tokens: usize,
    quants: Buffer<u32>, // [token][run][4][4]
    scales: Buffer<f32>, // [run][padded tokens]
    totals: Buffer<u32>, // [run][padded tokens][2]
    first: Buffer<u16>,  // [padded tokens][columns], bf16
    second: Buffer<u16>, // the same: what `first` lost
}

impl Activations {
    /// Room for so many tokens of at most `columns`.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(device: &Device, max_tokens: usize, columns: usize) -> Result<Self, Error> {
        let padded = max_tokens.next_multiple_of(TOKEN_TILE);
        let (n, n_runs) = (padded * columns, columns.div_ceil(RUN));
        Ok(Self {
            max_tokens,
            quants: device.buffer(n_runs * padded * 16)?,
            scales: device.buffer(n_runs * padded)?,
            totals: device.buffer(2 * n_runs * padded)?,
            first: device.buffer(n)?,
            second: device.buffer(n)?,
        })
    }
}

/// One weight of a linear op.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    pub weight: &'a Matrix,
    pub parts: &'a Parts,
    /// `[parts, tokens, weight.rows()]`
    pub out: &'a Buffer<f32>,
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
    projections: &[Projection<'_>],
) -> Result<(), Error> {
    assert!(n_tokens <= activations.max_tokens && input.len() >= n_tokens * columns);
    if n_tokens == 0 {
        return Ok(());
    }
    let is_of = |want: fn(&Weights, Format) -> bool| {
        projections.iter().any(|one| want(&one.weight.weights, one.weight.format))
    };
    if is_of(|weights, _| matches!(weights, Weights::Quantised(_))) {
        quantise(input, columns, n_tokens, activations)?;
    }
    if is_of(|_, format| format == Format::Bf16) {
        split(input, columns, n_tokens, activations)?;
    }
    for projection in projections {
        let Projection { weight, parts, out } = *projection;
        assert_eq!(weight.columns, columns, "weights of other columns");
        assert!(parts.n_columns() <= columns, "parts beyond the columns");
        assert!(out.len() >= parts.len() * n_tokens * weight.rows, "an output too small");
        assert_together(out, input);
        multiply(input, n_tokens, activations, projection)?;
    }
    Ok(())
}

fn quantise(
    input: &Buffer<f32>,
    columns: usize,
    n_tokens: usize,
    to: &Activations,
) -> Result<(), Error> {
    let padded = n_tokens.next_multiple_of(TOKEN_TILE);
    assert!(columns.is_multiple_of(RUN) && to.quants.len() >= padded * columns / 2);
    let arguments = Arguments::new()
        .memory(input)
        .memory(&to.quants)
        .memory(&to.scales)
        .memory(&to.totals)
        .number(columns)
        .number(n_tokens);
    let geometry = Geometry::new((columns / RUN).div_ceil(LINEAR_THREADS / 8), padded, 1);
    // SAFETY: eight lanes a run of a padded token; the scratch holds as many of the widest columns.
    unsafe { launch(input.device(), kernels::QUANTISE, geometry, arguments) }
}

fn split(
    input: &Buffer<f32>,
    columns: usize,
    n_tokens: usize,
    to: &Activations,
) -> Result<(), Error> {
    let padded = n_tokens.next_multiple_of(TOKEN_TILE);
    assert!(columns.is_multiple_of(RUN) && to.first.len() >= padded * columns);
    let arguments = Arguments::new()
        .memory(input)
        .memory(&to.first)
        .memory(&to.second)
        .number(columns)
        .number(n_tokens);
    let geometry = Geometry::new(padded, 1, 1);
    // SAFETY: a block a padded token, of which the scratch has as many.
    unsafe { launch(input.device(), kernels::SPLIT_BF16, geometry, arguments) }
}

fn multiply(
    input: &Buffer<f32>,
    n_tokens: usize,
    activations: &Activations,
    projection: &Projection<'_>,
) -> Result<(), Error> {
    let Projection { weight, parts, out } = *projection;
    let device = out.device();
    let tiles = |few, many| tile_grid(weight.rows, n_tokens, parts.len(), few, many);
    match (&weight.weights, kernels::of_format(weight.format).linear) {
        (Weights::Quantised(quantised), Linear::Tiles { few, many }) => {
            let arguments = Arguments::new()
                .structure(quantised)
                .memory(&activations.quants)
                .memory(&activations.scales)
                .memory(&activations.totals)
                .memory(&parts.on_device)
                .memory(out)
                .number(n_tokens);
            let (kernel, geometry) = tiles(few, many);
            // SAFETY: planes of the weight's own shape; activations of its columns, just made; an
            // output of the asserted size.
            unsafe { launch(device, kernel, geometry, arguments) }
        }
        (Weights::Halves(numbers), Linear::Tiles { few, many }) => {
            if n_tokens > MANY_TOKENS && device.driver().has_gemm() {
                return gemms(weight, numbers, parts, activations, out, n_tokens);
            }
            let arguments = Arguments::new()
                .memory(numbers)
                .memory(&activations.first)
                .memory(&activations.second)
                .memory(&parts.on_device)
                .memory(out)
                .number(weight.rows)
                .number(weight.columns / RUN)
                .number(n_tokens);
            let (kernel, geometry) = tiles(few, many);
            // SAFETY: as above; rows are padded to whole tiles.
            unsafe { launch(device, kernel, geometry, arguments) }
        }
        (weights, Linear::Plain(kernel)) => {
            let arguments = match weights {
                Weights::Halves(numbers) => Arguments::new().memory(numbers),
                Weights::Floats(numbers) => Arguments::new().memory(numbers),
                Weights::Quantised(_) => unreachable!("quantised formats have tiles"),
            };
            let arguments = arguments
                .memory(input)
                .memory(&parts.on_device)
                .memory(out)
                .number(weight.rows)
                .number(weight.columns)
                .number(n_tokens);
            let geometry = Geometry::new(weight.rows.div_ceil(WARPS), n_tokens, parts.len());
            // SAFETY: `[rows, columns]` of the kernel's number; an input and an output as asserted.
            unsafe { launch(device, kernel, geometry, arguments) }
        }
        (Weights::Floats(_), Linear::Tiles { .. }) => unreachable!("f32 has no tiles"),
    }
}

/// Blocks of a kernel on tensor cores, and which kernel.
fn tile_grid(
    rows: usize,
    n_tokens: usize,
    n_parts: usize,
    few: Kernel,
    many: Kernel,
) -> (Kernel, Geometry) {
    let (kernel, of_block) =
        if n_tokens <= FEW_TOKENS { (few, FEW_TOKENS) } else { (many, MANY_TOKENS) };
    let geometry = Geometry::new(rows.div_ceil(TILE_ROWS), n_tokens.div_ceil(of_block), n_parts);
    (kernel, geometry.shared_floats(WARPS * TOKEN_TILE * TILE_ROWS))
}

fn gemms(
    weight: &Matrix,
    numbers: &Buffer<u16>,
    parts: &Parts,
    activations: &Activations,
    out: &Buffer<f32>,
    n_tokens: usize,
) -> Result<(), Error> {
    for (part, bounds) in parts.bounds.windows(2).enumerate() {
        let first = (2 * bounds[0] * RUN) as u64;
        let gemm = Gemm {
            w: numbers.address() + first,
            x: activations.first.address() + first,
            out: out.address() + (4 * part * n_tokens * weight.rows) as u64,
            rows: weight.rows,
            tokens: n_tokens,
            columns: (bounds[1] - bounds[0]) * RUN,
            stride: weight.columns,
        };
        if weight.rows > 0 {
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
/// If `out` is too small.
pub fn embed(
    table: &Matrix,
    first_row: usize,
    tokens: View<'_, u32>,
    out: &Buffer<f32>,
) -> Result<(), Error> {
    assert!(out.len() >= tokens.len * table.columns);
    let arguments = match &table.weights {
        Weights::Quantised(quantised) => Arguments::new()
            .structure(quantised)
            .view(tokens)
            .memory(out)
            .number(first_row)
            .number(table.columns),
        Weights::Halves(numbers) => {
            dense_table(Arguments::new().memory(numbers), table, first_row, tokens, out)
        }
        Weights::Floats(numbers) => {
            dense_table(Arguments::new().memory(numbers), table, first_row, tokens, out)
        }
    };
    let kernel = kernels::of_format(table.format).embed;
    // SAFETY: a block a token; the kernel looks at no row that the table does not hold.
    unsafe { launch(out.device(), kernel, Geometry::new(tokens.len, 1, 1), arguments) }
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
    fn blocks_cover_rows_tokens_and_parts() {
        let kernel = |name| Kernel { name, threads: 256 };
        let (few, many) = (kernel("few"), kernel("many"));
        for (rows, n_tokens, n_parts, want, grid) in [
            (4096, 1, 1, few, [256, 1, 1]),
            (4097, 8, 2, few, [257, 1, 2]),
            (15, 9, 1, many, [1, 1, 1]),
            (16, 33, 3, many, [1, 2, 3]),
            (0, 5, 1, few, [0, 1, 1]),
        ] {
            let (kernel, geometry) = tile_grid(rows, n_tokens, n_parts, few, many);
            assert_eq!((kernel, geometry.grid), (want, grid), "{rows} {n_tokens} {n_parts}");
            assert_eq!(geometry.shared_bytes, 4 * 8 * 8 * 16);
        }
    }
}
