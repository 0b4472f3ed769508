//! Every CUDA kernel is compiled for the cards that Evener is for, by NVRTC and without a card:
//! `make test` fetches it (scripts/fetch-nvrtc).

use std::path::PathBuf;

use evener_kernels::attention::Format;
use evener_kernels::cuda::compiler::{self, Arch};
use evener_kernels::cuda::{Formats, Shape};
use evener_kernels::quant::Format as WeightFormat;

/// Ampere, Hopper, Blackwell.
const ARCHS: [Arch; 3] =
    [Arch { major: 8, minor: 0 }, Arch { major: 9, minor: 0 }, Arch { major: 10, minor: 0 }];

/// Heads of the models served, and each way of keeping keys and values.
const SHAPES: [Shape; 4] = [
    Shape { head_dim: 64, kv_format: Format::F16, formats: Formats::ALL },
    Shape { head_dim: 128, kv_format: Format::F16, formats: Formats::ALL },
    Shape { head_dim: 128, kv_format: Format::Int8, formats: Formats::ALL },
    Shape { head_dim: 96, kv_format: Format::F32, formats: Formats::ALL },
];

/// NVRTC's directory, if there is one: without it there is nothing to compile with, and the machine
/// says so.
fn nvrtc() -> Option<PathBuf> {
    let fetched = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../.cache/nvrtc/lib");
    let named = std::env::var_os("EVENER_NVRTC").map(PathBuf::from);
    let dir = named.or_else(|| fetched.join("stamp").exists().then_some(fetched));
    if dir.is_none() {
        println!("skipped: no NVRTC; scripts/fetch-nvrtc fetches it");
    }
    dir
}

#[test]
fn every_kernel_compiles_for_every_card_without_spills() {
    let Some(dir) = nvrtc() else { return };
    compiler::look_in(&dir);
    let version = compiler::version().unwrap_or_else(|| panic!("no NVRTC in {}", dir.display()));
    println!("NVRTC {version:?}");
    std::thread::scope(|scope| {
        for shape in SHAPES {
            scope.spawn(move || {
                // Each shape for one card, the commonest for all.
                let n_archs = if shape == SHAPES[1] { ARCHS.len() } else { 1 };
                for arch in ARCHS.into_iter().cycle().skip(1).take(n_archs) {
                    check(arch, shape);
                }
            });
        }
    });
}

#[test]
fn only_what_a_model_needs_is_compiled() {
    let Some(dir) = nvrtc() else { return };
    compiler::look_in(&dir);
    for format in [WeightFormat::Q4K, WeightFormat::Bf16, WeightFormat::Fp8] {
        let formats = Formats::from_iter([format]);
        let compiled = compiler::compile(ARCHS[1], Shape { formats, ..SHAPES[0] });
        let log = compiled.unwrap_or_else(|error| panic!("{format:?}: {error}")).log;
        // Those of plain floats are small, and always there.
        for other in Formats::EACH.into_iter().skip(2) {
            let linear = format!("linear_{}", other.name().to_lowercase());
            assert_eq!(log.contains(&linear), other == format, "{linear} for {format:?}");
        }
    }
}

fn check(arch: Arch, shape: Shape) {
    let compiled = compiler::compile(arch, shape);
    let compiled = compiled.unwrap_or_else(|error| panic!("{shape:?}: {error}"));
    assert_eq!(compiled.image[..4], *b"\x7fELF", "machine code");
    // The log has for each kernel its name, and how much of it did not fit the registers.
    let mut n_kernels = 0;
    let mut kernel = "";
    for line in compiled.log.lines() {
        if let Some((_, rest)) = line.split_once("Function properties for ") {
            kernel = rest.trim();
            n_kernels += 1;
        }
        if line.contains("spill stores") {
            let is_free = line.contains(" 0 bytes spill stores, 0 bytes spill loads");
            assert!(is_free, "{kernel} for {} and {shape:?}: {line}", arch.name());
        }
    }
    assert!(n_kernels > 30, "{n_kernels} kernels in the log of {}:\n{}", arch.name(), compiled.log);
}
