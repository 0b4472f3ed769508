//! Packing many matrices at once: the same matrices whatever the threads, in one memory, and none
//! if it was broken off.
#![allow(clippy::unwrap_used)]

use std::ops::{ControlFlow, Range};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use evener_kernels::matrix::{Source, Unpacked, pack_all};
use evener_kernels::quant::Format;
use evener_kernels::{Matrix, Pool};

/// Bytes without meaning, as a file's rows.
struct Noise {
    format: Format,
    row_bytes: usize,
    bytes: Vec<u8>,
}

impl Noise {
    fn new(format: Format, rows: usize, columns: usize) -> Self {
        let row_bytes = columns / format.block_len() * format.block_bytes();
        let byte = |i: usize| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] & 0x3f;
        Self { format, row_bytes, bytes: (0..rows * row_bytes).map(byte).collect() }
    }
}

impl Source for Noise {
    fn format(&self) -> Format {
        self.format
    }

    fn row_blocks(&self, row: usize) -> &[u8] {
        &self.bytes[row * self.row_bytes..(row + 1) * self.row_bytes]
    }

    fn first_column(&self) -> usize {
        0
    }

    fn row_f32(&self, row: usize, out: &mut [f32]) {
        for (out, four) in out.iter_mut().zip(self.row_blocks(row).as_chunks().0) {
            *out = f32::from_le_bytes(*four);
        }
    }
}

/// Rows and columns; the first is packed in several goes, the third has no rows.
const SHAPES: [(Format, usize, usize); 8] = [
    (Format::Q8_0, 3000, 1024),
    (Format::Q4_0, 40, 96),
    (Format::Q4K, 0, 256),
    (Format::Q4_1, 16, 32),
    (Format::Q4K, 100, 512),
    (Format::Q5_0, 33, 64),
    (Format::F32, 17, 64),
    (Format::Q5_1, 1, 32),
];

fn sources() -> Vec<Noise> {
    SHAPES.iter().map(|&(format, rows, columns)| Noise::new(format, rows, columns)).collect()
}

fn unpacked(sources: &[Noise]) -> Vec<Unpacked<'_>> {
    let with_source = |(source, &(_, rows, columns))| Unpacked { rows, columns, source };
    sources.iter().map(|source| source as &dyn Source).zip(&SHAPES).map(with_source).collect()
}

fn rows(matrix: &Matrix) -> Vec<u32> {
    let mut row = vec![0.0; matrix.columns()];
    let mut bits = Vec::new();
    for at in 0..matrix.rows() {
        matrix.dequantise_row(at, &mut row);
        bits.extend(row.iter().map(|weight| weight.to_bits()));
    }
    bits
}

#[test]
fn matrices_packed_together_by_any_threads_are_those_packed_alone() {
    let sources = sources();
    let unpacked = unpacked(&sources);
    let alone: Vec<_> =
        unpacked.iter().map(|m| rows(&Matrix::pack(m.rows, m.columns, m.source))).collect();
    for n_threads in [1, 2, 3, 7] {
        let admitted = Mutex::new(vec![Vec::<Range<usize>>::new(); SHAPES.len()]);
        let admit = |thread, matrix: usize, rows| {
            assert!(thread < n_threads);
            admitted.lock().unwrap()[matrix].push(rows);
            ControlFlow::Continue(())
        };
        let packed = pack_all(&mut Pool::new(n_threads, false), &unpacked, &admit);
        let packed = packed.unwrap().unwrap();
        assert_eq!(packed.iter().map(rows).collect::<Vec<_>>(), alone, "{n_threads} threads");
        for (mut ranges, (_, rows, _)) in admitted.into_inner().unwrap().into_iter().zip(SHAPES) {
            ranges.sort_by_key(|range| range.start);
            let mut end = 0;
            for range in ranges {
                assert_eq!(range.start, end, "every row is admitted once");
                end = range.end;
            }
            assert_eq!(end, rows);
        }
    }
}

#[test]
fn packing_that_is_broken_off_gives_no_matrix() {
    let sources = sources();
    let unpacked = unpacked(&sources);
    for n_threads in [1, 2] {
        let n_admitted = AtomicUsize::new(0);
        let admit = |_, _, _| match n_admitted.fetch_add(1, Ordering::Relaxed) {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        };
        let packed = pack_all(&mut Pool::new(n_threads, false), &unpacked, &admit).unwrap();
        assert!(packed.is_none());
        assert!(n_admitted.into_inner() <= 1 + n_threads, "a thread goes on after it broke off");
    }
}

#[test]
fn a_matrix_occupies_what_its_bits_need_and_less_than_a_line_a_part() {
    let parts = 6;
    for (format, columns) in [(Format::Q4_0, 576), (Format::Q4_1, 576), (Format::Q5_0, 96)]
        .into_iter()
        .chain([(Format::Q4K, 2048), (Format::Q5K, 2048), (Format::Q8_0, 2048)])
    {
        let matrix = Matrix::pack(64, columns, &Noise::new(format, 64, columns));
        let file = (64 * columns / format.block_len() * format.block_bytes()) as u64;
        // The 6-bit scales and mins of K-quants take a byte each: 4 bytes more a block of 256.
        let widened = if format.block_len() == 256 { (64 * columns / 256 * 4) as u64 } else { 0 };
        let most = file + widened + 4 * parts * 64;
        assert!((file..most).contains(&matrix.bytes()), "{format:?}: {}", matrix.bytes());
    }
}
