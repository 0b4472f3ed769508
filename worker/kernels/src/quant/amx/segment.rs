//! One tile of weights times one group of activations over some runs, in blocks of assembly: the
//! products of a run go through memory while those of the next are under way, and the float
//! operations of an earlier one fill the time between. Written by a compiler, the same work takes
//! twice as long: it keeps sums in memory and its vectors wait for its tiles.
//!
//! Whole windows follow each other without a break: a block ends with the first products of the
//! window after it in registers and memory. No code between two such blocks may use either.

use std::arch::asm;

use super::{Lanes, Product, Sums, WINDOW};
use crate::activation::GROUP;
use crate::tile_registers::REGISTER;

/// Runs between a product and its sum: less, and the sum waits for the product's store.
const LAG: usize = 3;

/// Places of products, which take turns.
pub(super) const PLACES: usize = 4;

/// Where the products of runs come from.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    /// Integers of a group: `[run, 16 rows, 2 terms, 32]`.
    pub(super) activations: *const i8,
    /// Unpacked weights of a tile: `[run, 1024]`.
    pub(super) weights: *const u8,
}

/// What a block reads and writes. Rows are those of the group; lanes those of the tile.
#[derive(Clone, Copy)]
pub(super) struct Segment {
    pub(super) of: Operands,
    /// Where products go: [`PLACES`] of them, or of pairs.
    pub(super) products: *mut Product,
    /// Of each run, and the mins of all runs after them.
    pub(super) scales: *const [[Lanes; WINDOW]; 2],
    /// Sums of the activations: `[run, 16 rows]`
    pub(super) sums: *const [f32; GROUP],
    /// Packed weights to bring near: of eight rows 256 or, of pairs of products, 512 bytes a run.
    /// Such a step waits for memory, and fetches that come together wait for each other.
    pub(super) ahead: *const u8,
    /// `to = from + d * sums`
    pub(super) from: *const Sums,
    pub(super) d: *const [f32; GROUP],
    pub(super) to: *mut Sums,
}

const _: () = assert!(LAG < PLACES && size_of::<Product>() == REGISTER && WINDOW == 8);

/// The text of a macro for each row, which also names a register that is free then.
#[rustfmt::skip]
macro_rules! rows {
    (8, $each:ident $($args:tt)*) => {
        concat!(
            $each!("0", "16" $($args)*), $each!("1", "17" $($args)*),
            $each!("2", "18" $($args)*), $each!("3", "19" $($args)*),
            $each!("4", "20" $($args)*), $each!("5", "21" $($args)*),
            $each!("6", "22" $($args)*), $each!("7", "23" $($args)*),
        )
    };
    (16, $each:ident $($args:tt)*) => {
        concat!(
            rows!(8, $each $($args)*),
            $each!("8", "24" $($args)*), $each!("9", "25" $($args)*),
            $each!("10", "26" $($args)*), $each!("11", "27" $($args)*),
            $each!("12", "16" $($args)*), $each!("13", "17" $($args)*),
            $each!("14", "18" $($args)*), $each!("15", "19" $($args)*),
        )
    };
}

/// Clears a row's sum.
#[rustfmt::skip]
macro_rules! clear {
    ($row:literal, $free:literal) => {
        concat!("vpxord zmm", $row, ", zmm", $row, ", zmm", $row, "\n")
    };
}

/// Puts a row's start in its register.
#[rustfmt::skip]
macro_rules! begin {
    ($row:literal, $free:literal) => {
        concat!("vmovaps zmm", $row, ", [{start} + 64*", $row, "]\n")
    };
}

/// Adds a row's product, times the run's scale; that in place `$place` is of run `$run`.
#[rustfmt::skip]
macro_rules! add {
    ($row:literal, $free:literal, one, $run:literal, $place:literal) => {
        concat!(
            "vcvtdq2ps zmm", $free, ", [{p} + 1024*", $place, " + 64*", $row, "]\n",
            "vfmadd231ps zmm", $row, ", zmm", $free, ", zmm31\n",
        )
    };
    ($row:literal, $free:literal, two, $run:literal, $place:literal) => {
        concat!(
            "vpslld zmm", $free, ", [{p} + 1024*(2*", $place, ") + 64*", $row, "], 4\n",
            "vpaddd zmm", $free, ", zmm", $free, ", [{p} + 1024*(2*", $place, " + 1) + 64*", $row,
            "]\n",
            "vcvtdq2ps zmm", $free, ", zmm", $free, "\n",
            "vfmadd231ps zmm", $row, ", zmm", $free, ", zmm31\n",
        )
    };
}

/// Adds the run's min times the sum of a row's activations.
#[rustfmt::skip]
macro_rules! add_min {
    ($row:literal, $free:literal, $run:literal) => {
        concat!(
            "vfmadd231ps zmm", $row, ", zmm30, dword ptr [{sums} + 64*", $run, " + 4*", $row,
            "]{{1to16}}\n",
        )
    };
}

/// All rows of a run.
#[rustfmt::skip]
macro_rules! sum {
    ($rows:tt, $terms:ident, plain, $f:ident, $run:literal, $place:literal) => {
        concat!(
            "vmovaps zmm31, [{scales} + 64*", $run, "]\n",
            fetch!($f, $terms, $run),
            rows!($rows, add, $terms, $run, $place),
        )
    };
    ($rows:tt, $terms:ident, min, $f:ident, $run:literal, $place:literal) => {
        concat!(
            "vmovaps zmm30, [{scales} + 512 + 64*", $run, "]\n",
            sum!($rows, $terms, plain, $f, $run, $place),
            rows!($rows, add_min, $run),
        )
    };
}

/// Multiplies a run of these segment's operands, or of the next one's; pairs of products go to
/// registers 0 and 1 or, of the other parity, 2 and 3.
#[rustfmt::skip]
macro_rules! product {
    ($terms:ident, $x:literal, $run:literal, $parity:ident) => {
        product!($terms, $x, $run, $parity, "a", "w")
    };
    ($terms:ident, $x:literal, next $run:literal, $parity:ident) => {
        product!($terms, $x, $run, $parity, "next_a", "next_w")
    };
    (one, $x:literal, $run:literal, even, $from:literal, $w:literal) => {
        product!(one, $x, $run, "0", "4", "6", $from, $w)
    };
    (one, $x:literal, $run:literal, odd, $from:literal, $w:literal) => {
        product!(one, $x, $run, "1", "5", "7", $from, $w)
    };
    (two, $x:literal, $run:literal, even, $from:literal, $w:literal) => {
        product!(two, $x, $run, "0", "1", "6", $from, $w)
    };
    (two, $x:literal, $run:literal, odd, $from:literal, $w:literal) => {
        product!(two, $x, $run, "2", "3", "7", $from, $w)
    };
    (
        one, $x:literal, $run:literal, $sum:literal, $a:literal, $b:literal, $from:literal,
        $w:literal
    ) => {
        concat!(
            "tileloadd tmm", $a, ", [{", $from, "} + {line} + 1024*", $run, "]\n",
            "tileloadd tmm", $b, ", [{", $w, "} + {line} + 1024*", $run, "]\n",
            "tilezero tmm", $sum, "\n",
            $x, " tmm", $sum, ", tmm", $a, ", tmm", $b, "\n",
        )
    };
    (
        two, $x:literal, $run:literal, $high:literal, $low:literal, $b:literal, $from:literal,
        $w:literal
    ) => {
        concat!(
            "tileloadd tmm4, [{", $from, "} + {line} + 1024*", $run, "]\n",
            "tileloadd tmm", $b, ", [{", $w, "} + {line} + 1024*", $run, "]\n",
            "tilezero tmm", $high, "\n",
            $x, " tmm", $high, ", tmm4, tmm", $b, "\n",
            "tileloadd tmm5, [{", $from, "} + {line} + 1024*", $run, " + 32]\n",
            "tilezero tmm", $low, "\n",
            $x, " tmm", $low, ", tmm5, tmm", $b, "\n",
        )
    };
}

/// Fetches ahead, evenly.
#[rustfmt::skip]
macro_rules! fetch {
    (far, $terms:ident, $run:literal) => { "" };
    (near, one, $run:literal) => { fetch!("256", $run, "0", "64", "128", "192") };
    (near, two, $run:literal) => {
        fetch!("512", $run, "0", "64", "128", "192", "256", "320", "384", "448")
    };
    ($stride:literal, $run:literal $(, $line:literal)+) => {
        concat!($("prefetcht1 [{ahead} + ", $stride, "*", $run, " + ", $line, "]\n"),+)
    };
}

/// Stores what [`product`] made.
#[rustfmt::skip]
macro_rules! keep {
    (one, $place:literal, even) => {
        keep!($place, "0")
    };
    (one, $place:literal, odd) => {
        keep!($place, "1")
    };
    (two, $place:literal, even) => {
        keep!($place, "0", "1")
    };
    (two, $place:literal, odd) => {
        keep!($place, "2", "3")
    };
    ($place:literal, $sum:literal) => {
        concat!("tilestored [{p} + {line} + 1024*", $place, "], tmm", $sum, "\n")
    };
    ($place:literal, $high:literal, $low:literal) => {
        concat!(
            "tilestored [{p} + {line} + 1024*(2*", $place, ")], tmm", $high, "\n",
            "tilestored [{p} + {line} + 1024*(2*", $place, " + 1)], tmm", $low, "\n",
        )
    };
}

/// Adds a row's sum, scaled.
#[rustfmt::skip]
macro_rules! end {
    ($row:literal, $free:literal) => {
        concat!(
            "vmovaps zmm", $free, ", [{from} + 64*", $row, "]\n",
            "vfmadd231ps zmm", $free, ", zmm", $row, ", dword ptr [{d} + 4*", $row, "]{{1to16}}\n",
            "vmovaps [{to} + 64*", $row, "], zmm", $free, "\n",
        )
    };
}

/// The order of work: products, their stores one later, their sums [`LAG`] later.
#[rustfmt::skip]
macro_rules! order {
    (1, $rows:tt, $t:ident, $m:ident, $x:literal) => {
        concat!(
            product!($t, $x, "0", even), keep!($t, "0", even),
            sum!($rows, $t, $m, near, "0", "0"),
        )
    };
    (2, $rows:tt, $t:ident, $m:ident, $x:literal) => {
        concat!(
            product!($t, $x, "0", even),
            product!($t, $x, "1", odd), keep!($t, "0", even),
            keep!($t, "1", odd), sum!($rows, $t, $m, near, "0", "0"),
            sum!($rows, $t, $m, near, "1", "1"),
        )
    };
    (4, $rows:tt, $t:ident, $m:ident, $x:literal) => {
        concat!(
            order!(enter, $t, $x),
            product!($t, $x, "3", odd), keep!($t, "2", even), sum!($rows, $t, $m, near, "0", "0"),
            keep!($t, "3", odd), sum!($rows, $t, $m, near, "1", "1"),
            sum!($rows, $t, $m, near, "2", "2"), sum!($rows, $t, $m, near, "3", "3"),
        )
    };
    // A window.
    (enter, $t:ident, $x:literal) => {
        concat!(
            product!($t, $x, "0", even),
            product!($t, $x, "1", odd), keep!($t, "0", even),
            product!($t, $x, "2", even), keep!($t, "1", odd),
        )
    };
    (middle, $rows:tt, $t:ident, $m:ident, $x:literal, $f:ident) => {
        concat!(
            product!($t, $x, "3", odd), keep!($t, "2", even), sum!($rows, $t, $m, $f, "0", "0"),
            product!($t, $x, "4", even), keep!($t, "3", odd), sum!($rows, $t, $m, $f, "1", "1"),
            product!($t, $x, "5", odd), keep!($t, "0", even), sum!($rows, $t, $m, $f, "2", "2"),
            product!($t, $x, "6", even), keep!($t, "1", odd), sum!($rows, $t, $m, $f, "3", "3"),
            product!($t, $x, "7", odd), keep!($t, "2", even), sum!($rows, $t, $m, $f, "4", "0"),
        )
    };
    (last, $rows:tt, $t:ident, $m:ident, $x:literal) => {
        concat!(
            order!(middle, $rows, $t, $m, $x, near),
            keep!($t, "3", odd), sum!($rows, $t, $m, near, "5", "1"),
            sum!($rows, $t, $m, near, "6", "2"), sum!($rows, $t, $m, near, "7", "3"),
        )
    };
    // The same, and the first products of the next.
    (then_enter, $rows:tt, $t:ident, $m:ident, $x:literal) => {
        concat!(
            order!(middle, $rows, $t, $m, $x, far),
            product!($t, $x, next "0", even), keep!($t, "3", odd),
            sum!($rows, $t, $m, far, "5", "1"),
            product!($t, $x, next "1", odd), keep!($t, "0", even),
            sum!($rows, $t, $m, far, "6", "2"),
            product!($t, $x, next "2", even), keep!($t, "1", odd),
            sum!($rows, $t, $m, far, "7", "3"),
        )
    };
}

/// Sums of so many runs and rows in this order; `$begin` fills the registers of the sums.
macro_rules! block {
    (
        $segment:expr, $order:tt, $rows:tt, $terms:ident, $min:ident, $multiply:literal,
        $begin:expr $(, $name:ident = $value:expr)*
    ) => {{
        let of: Segment = $segment;
        asm!(
            $begin,
            order!($order, $rows, $terms, $min, $multiply),
            rows!($rows, end),
            // Named by all, used by some.
            "/* {sums} {ahead} */",
            a = in(reg) of.of.activations,
            w = in(reg) of.of.weights,
            p = in(reg) of.products,
            scales = in(reg) of.scales,
            sums = in(reg) of.sums,
            ahead = in(reg) of.ahead,
            from = in(reg) of.from,
            d = in(reg) of.d,
            to = in(reg) of.to,
            line = in(reg) 64usize,
            $($name = in(reg) $value,)*
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _,
            out("zmm5") _, out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _,
            out("zmm10") _, out("zmm11") _, out("zmm12") _, out("zmm13") _, out("zmm14") _,
            out("zmm15") _, out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
            out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _, out("zmm24") _,
            out("zmm25") _, out("zmm26") _, out("zmm27") _, out("zmm30") _, out("zmm31") _,
            options(nostack, preserves_flags),
        )
    }};
}

/// How a format's runs become products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Weights of 4 bits times 16 still are bytes: one product of both terms. Signed, no min.
    OneSigned,
    /// As above, unsigned, with a min.
    OneWithMin,
    /// A product for each term. Signed, no min.
    TwoSigned,
    /// As above, unsigned, with a min.
    TwoWithMin,
}

/// Calls a macro with a shape's words.
macro_rules! of_shape {
    ($shape:expr, $each:ident $(, $args:tt)*) => {
        match $shape {
            Shape::OneSigned => $each!($($args,)* one, plain, "tdpbssd"),
            Shape::OneWithMin => $each!($($args,)* one, min, "tdpbsud"),
            Shape::TwoSigned => $each!($($args,)* two, plain, "tdpbssd"),
            Shape::TwoWithMin => $each!($($args,)* two, min, "tdpbsud"),
        }
    };
}

/// Begins the first window of a row of windows.
///
/// # Safety
/// The operands are there for these runs, and the registers configured for the shape.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn enter(shape: Shape, of: Operands, products: *mut Product) {
    macro_rules! enter {
        ($terms:ident, $min:ident, $multiply:literal) => {
            asm!(
                order!(enter, $terms, $multiply),
                a = in(reg) of.activations,
                w = in(reg) of.weights,
                p = in(reg) products,
                line = in(reg) 64usize,
                options(nostack, preserves_flags),
            )
        };
    }
    // SAFETY: the caller's promise.
    unsafe { of_shape!(shape, enter) }
}

/// Runs a window of 8 runs, 8 or 16 rows, that was begun; and begins the next, if there is one.
///
/// # Safety
/// Everything that it reads and writes is there for these runs, on cache lines of its own, and the
/// registers are configured for the shape and the rows.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn window<const ROWS: usize>(
    shape: Shape,
    segment: Segment,
    next: Option<Operands>,
) {
    macro_rules! last {
        ($rows:tt, $terms:ident, $min:ident, $multiply:literal) => {
            block!(segment, last, $rows, $terms, $min, $multiply, rows!($rows, clear))
        };
    }
    macro_rules! then_enter {
        ($rows:tt, $next:ident, $terms:ident, $min:ident, $multiply:literal) => {
            block!(
                segment,
                then_enter,
                $rows,
                $terms,
                $min,
                $multiply,
                rows!($rows, clear),
                next_a = $next.activations,
                next_w = $next.weights
            )
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match (ROWS, next) {
            (8, None) => of_shape!(shape, last, 8),
            (8, Some(next)) => of_shape!(shape, then_enter, 8, next),
            (16, None) => of_shape!(shape, last, 16),
            (16, Some(next)) => of_shape!(shape, then_enter, 16, next),
            _ => unreachable!("blocks of {ROWS} rows"),
        }
    }
}

/// Runs 1, 2 or 4 runs, 8 or 16 rows, from their products to their sums, which it adds to `start`.
///
/// # Safety
/// As of [`window`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn short<const ROWS: usize>(
    shape: Shape,
    n_runs: usize,
    segment: Segment,
    start: *const Sums,
) {
    macro_rules! short {
        ($runs:tt, $rows:tt, $terms:ident, $min:ident, $multiply:literal) => {
            block!(
                segment,
                $runs,
                $rows,
                $terms,
                $min,
                $multiply,
                rows!($rows, begin),
                start = start
            )
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match (ROWS, n_runs) {
            (8, 1) => of_shape!(shape, short, 1, 8),
            (8, 2) => of_shape!(shape, short, 2, 8),
            (8, 4) => of_shape!(shape, short, 4, 8),
            (16, 1) => of_shape!(shape, short, 1, 16),
            (16, 2) => of_shape!(shape, short, 2, 16),
            (16, 4) => of_shape!(shape, short, 4, 16),
            _ => unreachable!("{n_runs} runs of {ROWS} rows"),
        }
    }
}
