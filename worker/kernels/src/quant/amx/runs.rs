//! Formats with a float scale for each run: every run's products become floats.
//!
//! Weights of 4 bits times 16 still are bytes, so that both terms of an activation go into one
//! product; wider ones need a product for each term.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::avx512::{at, head, nibbles, scales, vectors};
use super::super::blocks::{Blocks, RUN, Scales};
use super::super::tiles::quant_bytes;
use super::segment::{self, Operands, Segment, Shape};
use super::{At, Lanes, Scratch, Sums, TERMS, WINDOW, Window};
use crate::activation::GROUP;
use crate::linear::{Group, TileWeights};
use crate::matrix::TILE_ROWS;
use crate::tile_registers::Registers;

/// Sums of nothing.
#[repr(align(64))]
struct Aligned(Sums);

static NOTHING: Aligned = Aligned([[0.0; TILE_ROWS]; GROUP]);

/// Scales that change nothing: what they multiply is no -0, being a sum that began with 0.
static ONES: [f32; GROUP] = [1.0; GROUP];

impl Shape {
    const fn of<B: Blocks>() -> Self {
        match (B::BITS, B::SCALES.has_min()) {
            (4, false) => Self::OneSigned,
            (4, true) => Self::OneWithMin,
            (_, false) => Self::TwoSigned,
            (_, true) => Self::TwoWithMin,
        }
    }

    const fn is_one(self) -> bool {
        matches!(self, Self::OneSigned | Self::OneWithMin)
    }

    const fn is_signed(self) -> bool {
        matches!(self, Self::OneSigned | Self::TwoSigned)
    }
}

/// Products in registers 0 to 3, activations in 4 and 5, weights in 6 and 7.
///
/// # Safety
/// The CPU has what `Isa::Avx512Amx` says.
pub(super) unsafe fn configure<B: Blocks>(rows: usize) -> Registers {
    let width = if Shape::of::<B>().is_one() { 2 * RUN } else { RUN };
    let (product, activations, weights) = ((rows, 64), (rows, width), (width / 4, 64));
    let shapes = [product, product, product, product, activations, activations, weights, weights];
    // SAFETY: the caller's promise.
    unsafe { Registers::configure(shapes) }
}

/// Weights as `[run, 8, 64]` bytes; of 4 bits, before them the same times 16.
///
/// # Safety
/// The tile has these runs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,gfni")]
pub(super) unsafe fn unpack<B: Blocks>(
    w: &TileWeights<'_>,
    window: Range<usize>,
    t: usize,
    scratch: &mut Scratch,
) {
    let zero = _mm512_set1_epi8(B::ZERO as i8);
    for (i, b) in window.enumerate() {
        let to = scratch.weights[t][i].as_mut_ptr();
        // SAFETY: 16 vectors of 64 bytes.
        let put = |at: usize, v| unsafe { _mm512_store_si512(to.add(at * 64).cast(), v) };
        // SAFETY: the caller's promise; lanes are 16 floats.
        unsafe {
            let run = at::<B>(w, b);
            for j in 0..4 {
                if B::BITS == 4 {
                    let packed = nibbles(run, j);
                    let [left, right, left_16, right_16] = if Shape::of::<B>().is_signed() {
                        apart::<0xf8, 0x80>(packed, SIGNED)
                    } else {
                        apart::<0, 0>(packed, UNSIGNED)
                    };
                    put(j, left_16);
                    put(4 + j, right_16);
                    put(8 + j, left);
                    put(12 + j, right);
                } else {
                    let (left, right) = vectors::<B>(run, j);
                    let centred = |v| match Shape::of::<B>().is_signed() {
                        true => _mm512_sub_epi8(v, zero),
                        false => v,
                    };
                    put(j, centred(left));
                    put(4 + j, centred(right));
                }
            }
            let (scale, min) = scales::<B>(run, head::<B>(w, b));
            _mm512_store_ps(scratch.scales[t][0][i].as_mut_ptr(), scale);
            let min = match B::SCALES {
                Scales::Super => _mm512_sub_ps(_mm512_setzero_ps(), min),
                _ => min,
            };
            _mm512_store_ps(scratch.scales[t][1][i].as_mut_ptr(), min);
        }
    }
}

/// Bits of a byte that make each bit of another, highest first: low and high nibble, and both times
/// 16.
type Bits = [u64; 4];

const UNSIGNED: Bits =
    [0x0102_0408_0000_0000, 0x1020_4080_0000_0000, 0x0000_0000_0102_0408, 0x0000_0000_1020_4080];

/// Of nibbles less 8: their highest bit, turned round, is all higher ones.
const SIGNED: Bits =
    [0x0102_0408_0808_0808, 0x1020_4080_8080_8080, 0x0000_0000_0102_0408, 0x0000_0000_1020_4080];

/// Nibbles as bytes, by bits; those of `PLAIN`, and of `BY_16` where they are times 16, are turned
/// round.
#[inline]
#[target_feature(enable = "avx512f,gfni")]
fn apart<const PLAIN: i32, const BY_16: i32>(packed: __m512i, bits: Bits) -> [__m512i; 4] {
    let bits = bits.map(|bits| _mm512_set1_epi64(bits as i64));
    [
        _mm512_gf2p8affine_epi64_epi8::<PLAIN>(packed, bits[0]),
        _mm512_gf2p8affine_epi64_epi8::<PLAIN>(packed, bits[1]),
        _mm512_gf2p8affine_epi64_epi8::<BY_16>(packed, bits[2]),
        _mm512_gf2p8affine_epi64_epi8::<BY_16>(packed, bits[3]),
    ]
}

/// Where the products of a window begin.
pub(super) fn operands(
    window: &Window,
    group: &Group<'_>,
    t: usize,
    scratch: &Scratch,
) -> Operands {
    Operands {
        activations: group.q[group.place(TERMS, window.blocks.start, 0)..].as_ptr(),
        weights: scratch.weights[t].as_ptr().cast(),
    }
}

/// What comes before a window, after it, and later.
///
/// In registers, as are the operands of the next window: from memory, just written, they would be
/// read only after all products that are on their way there.
pub(super) struct Between {
    /// The one before began this one.
    pub(super) is_begun: bool,
    /// Whole windows begin the next.
    pub(super) is_followed: bool,
    /// Packed weights to bring near.
    pub(super) ahead: *const u8,
}

/// Adds a tile's sums of a group in a window, times the scales of its rows, to the totals.
///
/// # Safety
/// The group has these runs, and the scratch their weights; the registers are configured, and those
/// of a window that is begun are as they were left.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn multiply<B: Blocks, const ROWS: usize>(
    window: &Window,
    group: &Group<'_>,
    at: At,
    between: Between,
    next: Operands,
    scratch: &mut Scratch,
) {
    let shape = Shape::of::<B>();
    let d: *const [f32; GROUP] = &group.d.as_chunks().0[window.idx];
    let sums = group.sum.as_chunks::<GROUP>().0;
    let total = &raw mut scratch.total[at.sums];
    let zero = &raw const NOTHING.0;
    let of = operands(window, group, at.weights, scratch);
    let Between { is_begun, is_followed, ahead } = between;
    let run = window.blocks.start;
    let segment = Segment {
        of,
        products: scratch.products.as_mut_ptr(),
        scales: &raw const scratch.scales[at.weights],
        sums: sums[run..].as_ptr(),
        ahead,
        from: if window.begins_leaf { zero } else { total },
        d,
        to: total,
    };
    if window.blocks.len() == WINDOW {
        // SAFETY: the caller's promise; a group has 16 rows (it is padded) of each term, and nothing
        // but the segment uses the scratch meanwhile.
        unsafe {
            if !is_begun {
                segment::enter(shape, of, segment.products);
            }
            segment::window::<ROWS>(shape, segment, is_followed.then_some(next));
        }
        return;
    }
    let mut first = 0;
    while first < window.blocks.len() {
        // The largest of 4, 2 and 1 runs that are left.
        let n = 1 << (window.blocks.len() - first).ilog2();
        let is_last = first + n == window.blocks.len();
        let acc = &raw mut scratch.acc;
        let run = run + first;
        let segment = Segment {
            of: Operands {
                activations: group.q[group.place(TERMS, run, 0)..].as_ptr(),
                weights: scratch.weights[at.weights][first..].as_ptr().cast(),
            },
            // Further on in the same arrays.
            scales: segment.scales.cast::<Lanes>().wrapping_add(first).cast(),
            sums: sums[run..].as_ptr(),
            ahead: ahead.wrapping_add(first * quant_bytes(B::BITS)),
            from: if is_last { segment.from } else { zero },
            d: if is_last { d } else { &raw const ONES },
            to: if is_last { total } else { acc },
            ..segment
        };
        let start = if first == 0 { zero } else { acc };
        // SAFETY: as above.
        unsafe { segment::short::<ROWS>(shape, n, segment, start) };
        first += n;
    }
}
