//! From the rows of a file to the record of a tile: blocks come apart into runs, and the words of 16
//! rows are turned into vectors. All instruction sets give the same bytes.

use std::ops::Range;

use super::blocks::{Blocks, RUN};
use super::tiles::{FIFTHS, HALVES, Places, Record, quant_bytes};
use crate::isa::Isa;
use crate::matrix::{Source, TILE_ROWS};

/// A block of any format, for the rows that the last tile lacks.
const NO_ROW: [u8; 256] = [0; 256];

/// The blocks of a tile's rows; none of a row that there is not.
type Rows<'a> = [Option<&'a [u8]>; TILE_ROWS];

/// [`super::blocks::Run::words`] of each row.
type Words = [[u32; 8]; TILE_ROWS];

impl Record {
    /// Packs a tile's rows into its bytes. Rows that there are not weigh nothing.
    pub(crate) fn pack<B: Blocks>(
        &self,
        isa: Isa,
        source: &dyn Source,
        rows: Range<usize>,
        record: &mut [u8],
    ) {
        assert!(rows.len() <= TILE_ROWS && record.len() == self.len(), "one tile, {rows:?}");
        let rows: Rows<'_> = std::array::from_fn(|lane| {
            (lane < rows.len()).then(|| source.row_blocks(rows.start + lane))
        });
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this `Isa` was detected on this CPU.
            Isa::Avx512Amx | Isa::Avx512Vnni => unsafe { self.pack_avx512::<B>(&rows, record) },
            _ => self.pack_runs::<B>(&rows, record, turn),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2")]
    fn pack_avx512<B: Blocks>(&self, rows: &Rows<'_>, record: &mut [u8]) {
        self.pack_runs::<B>(rows, record, |words, vectors| avx512::turn(words, vectors));
    }

    /// `turn` makes vectors, 4, 6 or 8 of them, of the words of 16 rows.
    #[inline(always)]
    fn pack_runs<B: Blocks>(
        &self,
        rows: &Rows<'_>,
        record: &mut [u8],
        turn: impl Fn(&Words, &mut [[u8; 64]]),
    ) {
        let (runs_per_block, size) = (B::FORMAT.block_len() / RUN, B::FORMAT.block_bytes());
        for b in 0..self.n_runs {
            let at = self.first_run + b;
            let start = at / runs_per_block * size;
            let mut words: Words = [[0; 8]; TILE_ROWS];
            let mut rest = Rest::default();
            for lane in 0..TILE_ROWS {
                let block = match rows[lane] {
                    Some(blocks) => &blocks[start..start + size],
                    None => &NO_ROW[..size],
                };
                let run = B::run(block, at % runs_per_block);
                words[lane] = run.words;
                rest.fifths[lane] = run.fifths;
                (rest.d[lane], rest.m[lane]) = (run.d, run.m);
                (rest.sc[lane], rest.mc[lane]) = (run.sc, run.mc);
            }
            let bytes = &mut record[B::run_at(self.first_run, b)..][..B::RUN_BYTES];
            turn(&words, bytes[..quant_bytes(B::BITS)].as_chunks_mut().0);
            rest.store::<B>(bytes);
            let head = &mut record[B::head_at(self.first_run, b)..][..B::HALVES_BYTES];
            store_scales(&mut head[..HALVES], &rest.d);
            if B::SCALES.has_min() {
                store_scales(&mut head[HALVES..], &rest.m);
            }
        }
    }
}

/// One f16 of each row.
#[inline(always)]
fn store_scales(to: &mut [u8], scales: &[u16; TILE_ROWS]) {
    for (two, scale) in to.as_chunks_mut::<2>().0.iter_mut().zip(scales) {
        *two = scale.to_ne_bytes();
    }
}

/// What the runs of 16 rows have beside their quants.
#[derive(Default)]
struct Rest {
    fifths: [u32; TILE_ROWS],
    d: [u16; TILE_ROWS],
    m: [u16; TILE_ROWS],
    sc: [u8; TILE_ROWS],
    mc: [u8; TILE_ROWS],
}

impl Rest {
    /// Fifth bits and integer scales, among the bytes of the run.
    #[inline(always)]
    fn store<B: Blocks>(&self, run: &mut [u8]) {
        if B::BITS == 5 {
            let masks = &mut run[B::FIFTHS_AT..][..FIFTHS];
            for (vector, mask) in masks.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let first = vector % 2 * 16 + vector / 2 * 4;
                let mut bits = 0;
                for lane in 0..TILE_ROWS {
                    bits |= u64::from(self.fifths[lane] >> first & 15) << (4 * lane);
                }
                *mask = bits.to_le_bytes();
            }
        }
        if B::SCALES.is_super() {
            let (sc, mc) = run[B::SCALES_AT..].split_at_mut(TILE_ROWS);
            sc.copy_from_slice(&self.sc);
            mc.copy_from_slice(&self.mc);
        }
    }
}

/// Vector i is word i of every row.
#[inline(always)]
fn turn(words: &Words, vectors: &mut [[u8; 64]]) {
    for (lane, words) in words.iter().enumerate() {
        for (vector, word) in vectors.iter_mut().zip(words) {
            vector[4 * lane..4 * lane + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::Words;

    /// [`super::turn`], four words of all rows at a time.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn turn(words: &Words, vectors: &mut [[u8; 64]]) {
        for (four, vectors) in vectors.chunks_mut(4).enumerate() {
            let turned = turn_four(words, 4 * four);
            for (vector, turned) in vectors.iter_mut().zip(turned) {
                // SAFETY: a vector has 64 bytes.
                unsafe { _mm512_storeu_si512(vector.as_mut_ptr().cast(), turned) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn turn_four(words: &Words, first: usize) -> [__m512i; 4] {
        // A row's four words.
        let row = |row: usize| {
            let four: &[u32; 4] = words[row][first..].first_chunk().expect("a row has eight");
            // SAFETY: it has 16 bytes.
            unsafe { _mm_loadu_si128(four.as_ptr().cast()) }
        };
        // Quarter q is row 4 q + i, so that below each quarter turns its own four rows.
        let rows = |i: usize| {
            let rows = _mm512_castsi128_si512(row(i));
            let rows = _mm512_inserti32x4::<1>(rows, row(4 + i));
            let rows = _mm512_inserti32x4::<2>(rows, row(8 + i));
            _mm512_inserti32x4::<3>(rows, row(12 + i))
        };
        let [a, b, c, d] = [rows(0), rows(1), rows(2), rows(3)];
        let low = [_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)];
        let high = [_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)];
        [
            _mm512_unpacklo_epi64(low[0], low[1]),
            _mm512_unpackhi_epi64(low[0], low[1]),
            _mm512_unpacklo_epi64(high[0], high[1]),
            _mm512_unpackhi_epi64(high[0], high[1]),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Format, with_blocks};

    /// Rows of bytes without meaning, of which some columns in front are another rank's.
    struct Noise {
        format: Format,
        row_bytes: usize,
        first_column: usize,
        bytes: Vec<u8>,
    }

    impl Source for Noise {
        fn format(&self) -> Format {
            self.format
        }

        fn row_blocks(&self, row: usize) -> &[u8] {
            &self.bytes[row * self.row_bytes..(row + 1) * self.row_bytes]
        }

        fn first_column(&self) -> usize {
            self.first_column
        }

        fn row_f32(&self, _: usize, _: &mut [f32]) {
            unreachable!("quantised formats have blocks")
        }
    }

    #[test]
    fn all_instruction_sets_pack_the_same_bytes() {
        let columns = 640;
        for format in Format::ALL {
            for first_column in [0, 96] {
                let first_column = first_column % format.block_len();
                let n_blocks = (first_column + columns).div_ceil(format.block_len());
                let row_bytes = n_blocks * format.block_bytes();
                let byte = |i: u32| i.wrapping_mul(2_654_435_761).to_be_bytes()[0];
                let bytes = (0..(20 * row_bytes) as u32).map(byte).collect();
                let noise = Noise { format, row_bytes, first_column, bytes };
                with_blocks!(format, B => check::<B>(&noise, columns), _ => {});
            }
        }
    }

    fn check<B: Blocks>(noise: &Noise, columns: usize) {
        let record = Record::new::<B>(columns, noise.first_column);
        for rows in [0..16, 3..19, 16..20, 5..5] {
            let pack = |isa| {
                let mut bytes = vec![0; record.len()];
                record.pack::<B>(isa, noise, rows.clone(), &mut bytes);
                bytes
            };
            let plain = pack(Isa::Portable);
            for isa in Isa::available() {
                assert!(pack(isa) == plain, "{:?} {rows:?} {}", noise.format, isa.name());
            }
        }
    }
}
