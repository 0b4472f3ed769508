//! The kernels by name, and how many threads a block of each has: what `worker/kernels/cuda` says.

use super::launch::Kernel;
use super::source::{Formats, Shape};
use crate::attention;
use crate::quant::Format;

const fn kernel(name: &'static str, threads: u32) -> Kernel {
    Kernel { name, threads }
}

/// Threads of kernels that take a row, or numbers one by one.
pub(super) const ROW_THREADS: usize = 256;
/// Of those that multiply few tokens, and many.
pub(super) const FEW_THREADS: usize = 384;
pub(super) const MANY_THREADS: usize = 256;
/// Of those that look at each weight once: rows looked up, or turned to bf16, or multiplied plainly.
pub(super) const PACK_THREADS: usize = 256;
pub(super) const PACK_WARPS: usize = PACK_THREADS / 32;
pub(super) const MAKE_THREADS: usize = 128;
pub(super) const NORM_THREADS: usize = 512;
const ROPE_THREADS: u32 = 128;

pub(super) const MAKE_PLAIN: Kernel = kernel("make_plain", MAKE_THREADS as u32);
pub(super) const RMS_NORM: Kernel = kernel("rms_norm", NORM_THREADS as u32);
pub(super) const SILU_GATE: Kernel = kernel("silu_gate", MAKE_THREADS as u32);
pub(super) const ADD_PARTS: Kernel = kernel("add_parts", ROW_THREADS as u32);
pub(super) const CANDIDATES: Kernel = kernel("candidates", ROW_THREADS as u32);
pub(super) const LIKELIEST: Kernel = kernel("likeliest", 32);
pub(super) const PEAKS: Kernel = kernel("peaks", 32);
pub(super) const ROUTE_TOKENS: Kernel = kernel("route_tokens", 32);
pub(super) const GATHER_ROWS: Kernel = kernel("gather_rows", ROW_THREADS as u32);
pub(super) const SCATTER_ROWS: Kernel = kernel("scatter_rows", ROW_THREADS as u32);
pub(super) const COMBINE_EXPERTS: Kernel = kernel("combine_experts", ROW_THREADS as u32);
pub(super) const ROPE_KV: Kernel = kernel("rope_kv", ROPE_THREADS);
/// Of a cache in f16.
pub(super) const ATTEND: Kernel = kernel("attend", 128);
/// Of other caches.
pub(super) const ATTEND_PLAIN: Kernel = kernel("attend_plain", 256);
pub(super) const MERGE_ATTENDED: Kernel = kernel("merge_attended", 128);
/// Of a cache in f16 only.
pub(super) const ATTEND_TILES: Kernel = kernel("attend_tiles", 128);

/// The kernels that know one weight format.
#[derive(Debug, Clone, Copy)]
pub(super) struct OfFormat {
    /// None of FP8: no table is kept in it.
    pub(super) embed: Option<Kernel>,
    pub(super) linear: Linear,
}

/// What multiplies with weights of a format.
#[derive(Debug, Clone, Copy)]
pub(super) enum Linear {
    /// Tiles of rows on tensor cores: a block takes one token, four (of integers only), 8, or 32. `to_bf16`:
    /// what is not bf16 already, for many.
    Tiles { one: Kernel, four: Option<Kernel>, few: Kernel, many: Kernel, to_bf16: Option<Kernel> },
    /// A warp takes a row and a token.
    Plain(Kernel),
}

macro_rules! of_format {
    ($name:literal) => {
        of_format!(
            $name,
            Some(kernel(concat!("linear_", $name, "_4"), FEW_THREADS as u32)),
            Some(kernel(concat!("to_bf16_", $name), PACK_THREADS as u32))
        )
    };
    ($name:literal, plain) => {
        OfFormat {
            embed: Some(kernel(concat!("embed_", $name), PACK_THREADS as u32)),
            linear: Linear::Plain(kernel(concat!("linear_", $name), PACK_THREADS as u32)),
        }
    };
    ($name:literal, $four:expr, $to_bf16:expr) => {
        OfFormat {
            embed: Some(kernel(concat!("embed_", $name), PACK_THREADS as u32)),
            linear: Linear::Tiles {
                one: kernel(concat!("linear_", $name, "_1"), FEW_THREADS as u32),
                four: $four,
                few: kernel(concat!("linear_", $name, "_8"), FEW_THREADS as u32),
                many: kernel(concat!("linear_", $name, "_32"), MANY_THREADS as u32),
                to_bf16: $to_bf16,
            },
        }
    };
}

pub(super) const fn of_format(format: Format) -> OfFormat {
    match format {
        Format::F32 => of_format!("f32", plain),
        Format::F16 => of_format!("f16", plain),
        Format::Bf16 => of_format!("bf16", None, None),
        Format::Q4_0 => of_format!("q4_0"),
        Format::Q4_1 => of_format!("q4_1"),
        Format::Q5_0 => of_format!("q5_0"),
        Format::Q5_1 => of_format!("q5_1"),
        Format::Q8_0 => of_format!("q8_0"),
        Format::Q4K => of_format!("q4_k"),
        Format::Q5K => of_format!("q5_k"),
        Format::Q6K => of_format!("q6_k"),
        Format::Fp8 => {
            let to_bf16 = kernel("to_bf16_fp8", PACK_THREADS as u32);
            OfFormat { embed: None, ..of_format!("fp8", None, Some(to_bf16)) }
        }
    }
}

/// All that are compiled for a shape.
pub(super) fn all(shape: Shape) -> Vec<Kernel> {
    let mut all = vec![
        MAKE_PLAIN,
        RMS_NORM,
        SILU_GATE,
        ADD_PARTS,
        CANDIDATES,
        LIKELIEST,
        PEAKS,
        ROUTE_TOKENS,
        GATHER_ROWS,
        SCATTER_ROWS,
        COMBINE_EXPERTS,
        ROPE_KV,
        MERGE_ATTENDED,
    ];
    match shape.kv_format {
        attention::Format::F16 => all.extend([ATTEND, ATTEND_TILES]),
        attention::Format::F32 | attention::Format::Int8 => all.push(ATTEND_PLAIN),
    }
    for format in Formats::EACH.into_iter().filter(|&format| shape.formats.has(format)) {
        let OfFormat { embed, linear } = of_format(format);
        all.extend(embed);
        match linear {
            Linear::Tiles { one, four, few, many, to_bf16 } => {
                all.extend([one, few, many].into_iter().chain(four).chain(to_bf16))
            }
            Linear::Plain(kernel) => all.push(kernel),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::source::for_cards;
    use super::*;

    #[test]
    fn the_table_is_what_the_sources_say() {
        let source = for_cards();
        let threads_of = |constant: &str| {
            let line =
                source.lines().find(|line| line.starts_with(&format!("#define {constant} ")));
            let line = line.unwrap_or_else(|| panic!("{constant} is defined"));
            line.rsplit(' ').next().and_then(|n| n.parse::<u32>().ok()).expect("a number")
        };
        let of = |kv_format| all(Shape { head_dim: 64, kv_format, formats: Formats::ALL });
        // Those of weight formats are generated by a macro, all with these constants.
        assert_eq!(threads_of("FEW_THREADS") as usize, FEW_THREADS);
        assert_eq!(threads_of("FEW_WARPS") as usize, FEW_THREADS / 32);
        assert_eq!(threads_of("MANY_THREADS") as usize, MANY_THREADS);
        assert_eq!(threads_of("MANY_WARPS") as usize, MANY_THREADS / 32);
        assert_eq!(threads_of("PACK_WARPS") as usize, PACK_WARPS);
        let mut n_written = 0;
        let plain = [ATTEND_PLAIN];
        for Kernel { name, threads } in of(attention::Format::F16).into_iter().chain(plain) {
            let Some(at) = source.find(&format!("\n{name}(")) else { continue };
            n_written += 1;
            let before = source[..at].rsplit('\n').next().expect("a line before it");
            let (_, arguments) = before.split_once('(').expect("KERNEL(threads) and its like");
            let constant = arguments.split([',', ')']).next().expect("the threads");
            let said = constant.parse().unwrap_or_else(|_| threads_of(constant));
            assert_eq!(said, threads, "{name}");
        }
        assert_eq!(n_written, source.matches("\nKERNEL").count(), "each kernel of the sources");
        assert!(of(attention::Format::Int8).contains(&ATTEND_PLAIN));
    }
}
