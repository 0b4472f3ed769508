//! A weight matrix in kernel form: tiles of 16 rows, repacked once at load.
//!
//! A tile holds 16 output rows side by side, so that one vector instruction advances all of them
//! and each lane is one row's own sum. Matrices that are loaded together lie in one memory.

use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::dense::{self, Dense};
use crate::isa::Isa;
use crate::memory::{Memory, Stretch};
use crate::pool::{Pool, Shards, part};
use crate::quant::tiles::{Record, Tiles};
use crate::quant::{Format, with_blocks};

/// Rows of a tile: the lanes of a 512-bit vector.
pub const TILE_ROWS: usize = 16;

/// Packed bytes that a thread takes at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A packed matrix of `[rows, columns]`; columns are a multiple of 32.
#[derive(Debug)]
pub struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Of the tiles: the source's, or the floats that hold it where that has no kernel of its own.
    pub(crate) format: Format,
    pub(crate) weights: Weights,
}

#[derive(Debug)]
pub(crate) enum Weights {
    /// Multiplied with integer activations.
    Quantised(Tiles),
    /// Multiplied with f32 or bf16 activations.
    Dense(Dense),
}

impl Weights {
    /// Tile after tile, each of the same length.
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Quantised(tiles) => &tiles.bytes,
            Self::Dense(dense) => dense.bytes(),
        }
    }
}

/// Where a matrix's numbers come from.
pub trait Source: Sync {
    fn format(&self) -> Format;
    /// The blocks that cover one row.
    fn row_blocks(&self, row: usize) -> &[u8];
    /// Columns of a row's first block that are not part of it.
    fn first_column(&self) -> usize;
    /// The row as f32.
    fn row_f32(&self, row: usize, out: &mut [f32]);
}

/// A matrix that is to be packed.
#[derive(Clone, Copy)]
pub struct Unpacked<'a> {
    pub rows: usize,
    pub columns: usize,
    pub source: &'a dyn Source,
}

/// What a packed matrix will be.
#[derive(Debug, Clone)]
struct Layout {
    rows: usize,
    columns: usize,
    format: Format,
    tile_bytes: usize,
    /// Of quantised formats.
    record: Option<Record>,
}

/// Packs matrices into one memory, each thread of the pool its part of every matrix first and then
/// what others have left. `admit(thread, matrix, rows)` is called before rows are packed; when it
/// breaks off there are no matrices.
///
/// # Errors
/// There is not enough memory.
///
/// # Panics
/// If a matrix's columns, or where they begin in a block, are not a multiple of 32.
pub fn pack_all(
    pool: &mut Pool,
    matrices: &[Unpacked<'_>],
    admit: &(dyn Fn(usize, usize, Range<usize>) -> ControlFlow<()> + Sync),
) -> io::Result<Option<Vec<Matrix>>> {
    let layouts: Vec<Layout> = matrices.iter().map(Layout::new).collect();
    let mut places = Vec::with_capacity(layouts.len());
    let mut len = 0;
    for layout in &layouts {
        places.push(len..len + layout.bytes());
        len += layout.bytes();
    }
    let mut memory = Memory::zeroed(len)?;
    let n_threads = pool.n_threads();
    let chunks: Vec<Vec<Chunk>> =
        (0..n_threads).map(|thread| chunks(&layouts, thread, n_threads)).collect();
    let taken: Vec<AtomicUsize> = chunks.iter().map(|_| AtomicUsize::new(0)).collect();
    let is_stopped = AtomicBool::new(false);
    let isa = Isa::detect();
    let bytes = Shards::new(&mut memory);
    pool.run(&|thread| {
        for owner in (thread..n_threads).chain(0..thread) {
            while let Some(chunk) = chunks[owner].get(taken[owner].fetch_add(1, Ordering::Relaxed))
            {
                let (layout, source) = (&layouts[chunk.matrix], matrices[chunk.matrix].source);
                if is_stopped.load(Ordering::Relaxed)
                    || admit(thread, chunk.matrix, layout.rows_of(&chunk.tiles)).is_break()
                {
                    is_stopped.store(true, Ordering::Relaxed);
                    return;
                }
                for tile in chunk.tiles.clone() {
                    let start = places[chunk.matrix].start + tile * layout.tile_bytes;
                    // SAFETY: each tile is in one chunk, which one thread takes, and has bytes of
                    // its own.
                    let record = unsafe { bytes.range(start..start + layout.tile_bytes) };
                    layout.pack(isa, source, tile, record);
                }
            }
        }
    });
    if is_stopped.into_inner() {
        return Ok(None);
    }
    let memory = Arc::new(memory);
    let matrix = |(layout, place): (Layout, Range<usize>)| {
        layout.matrix(Stretch::new(Arc::clone(&memory), place))
    };
    Ok(Some(layouts.into_iter().zip(places).map(matrix).collect()))
}

/// Tiles that a thread packs in one go.
struct Chunk {
    matrix: usize,
    tiles: Range<usize>,
}

/// What belongs to a thread: the part of every matrix that it will multiply with.
fn chunks(layouts: &[Layout], thread: usize, n_threads: usize) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (matrix, layout) in layouts.iter().enumerate() {
        let own = part(layout.n_tiles(), thread, n_threads);
        let at_once = (CHUNK_BYTES / layout.tile_bytes.max(1)).max(1);
        for first in own.clone().step_by(at_once) {
            chunks.push(Chunk { matrix, tiles: first..(first + at_once).min(own.end) });
        }
    }
    chunks
}

impl Layout {
    fn new(matrix: &Unpacked<'_>) -> Self {
        let &Unpacked { rows, columns, source } = matrix;
        assert!(columns.is_multiple_of(32), "{columns} columns are not whole runs of 32");
        let first = source.first_column();
        assert!(first.is_multiple_of(32), "column {first} of a block begins no run of 32");
        let format = source.format();
        with_blocks!(format, B => {
            let record = Record::new::<B>(columns, first);
            Self { rows, columns, format, tile_bytes: record.len(), record: Some(record) }
        }, _ => {
            let format = dense::format_of(format);
            let tile_bytes = dense::tile_bytes(format, columns);
            Self { rows, columns, format, tile_bytes, record: None }
        })
    }

    fn n_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    fn bytes(&self) -> usize {
        self.n_tiles() * self.tile_bytes
    }

    fn rows_of(&self, tiles: &Range<usize>) -> Range<usize> {
        tiles.start * TILE_ROWS..(tiles.end * TILE_ROWS).min(self.rows)
    }

    fn pack(&self, isa: Isa, source: &dyn Source, tile: usize, bytes: &mut [u8]) {
        let rows = self.rows_of(&(tile..tile + 1));
        match &self.record {
            Some(record) => with_blocks!(
                self.format,
                B => record.pack::<B>(isa, source, rows, bytes),
                _ => unreachable!("quantised formats have blocks")
            ),
            None => dense::pack_tile(self.format, source, rows, bytes),
        }
    }

    fn matrix(self, bytes: Stretch) -> Matrix {
        let Self { rows, columns, format, tile_bytes: _, record } = self;
        let weights = match record {
            Some(record) => Weights::Quantised(Tiles { bytes, record }),
            None => Weights::Dense(Dense::new(format, columns, bytes)),
        };
        Matrix { rows, columns, format, weights }
    }
}

impl Matrix {
    /// Packs one matrix, on this thread.
    ///
    /// # Panics
    /// If `columns`, or where they begin in a block, is not a multiple of 32, or there is not
    /// enough memory.
    #[must_use]
    pub fn pack(rows: usize, columns: usize, source: &dyn Source) -> Self {
        let matrices = [Unpacked { rows, columns, source }];
        let admit = |_, _, _| ControlFlow::Continue(());
        let packed = pack_all(&mut Pool::new(1, false), &matrices, &admit);
        let packed = packed.expect("memory for a matrix").expect("nobody breaks off");
        packed.into_iter().next().expect("one was to be packed")
    }

    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    #[must_use]
    pub fn n_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Whether it is multiplied with integer activations, or with floats.
    #[must_use]
    pub fn is_quantised(&self) -> bool {
        matches!(self.weights, Weights::Quantised(_))
    }

    /// Memory it occupies.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.weights.bytes().len() as u64
    }

    /// The tiles that one of a pool's threads multiplies with, first to last, if it is as fast as the
    /// others.
    #[must_use]
    pub fn tiles_of(&self, thread: usize, n_threads: usize) -> &[u8] {
        let bytes = self.weights.bytes();
        let tile_bytes = bytes.len() / self.n_tiles().max(1);
        let tiles = part(self.n_tiles(), thread, n_threads);
        &bytes[tiles.start * tile_bytes..tiles.end * tile_bytes]
    }

    /// One row as f32, as the checkpoint's format defines it (a zero is +0).
    ///
    /// # Panics
    /// If there is no such row, or `out` is not its width.
    pub fn dequantise_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.columns, "row {row} of {}", self.rows);
        match &self.weights {
            Weights::Quantised(tiles) => with_blocks!(
                self.format,
                B => tiles.dequantise::<B>(row, out),
                _ => unreachable!("quantised formats have blocks")
            ),
            Weights::Dense(dense) => dense.dequantise(row, out),
        }
    }
}
