//! Loops of tile multiplications (AMX), for their peak alone. The instructions are written as
//! assembly: the compiler has no stable names for them.

use std::arch::asm;

/// Four products of 16 x 64 bytes with 64 x 16 a round.
pub(super) const OPS_INT8: usize = 4 * 2 * 16 * 16 * 64;
/// Four products of 16 x 32 numbers with 32 x 16 a round.
pub(super) const OPS_BF16: usize = 4 * 2 * 16 * 16 * 32;

/// Palette 1: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config([u8; 64]);

static CONFIG: Config = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    Config(bytes)
};

macro_rules! rounds_of {
    ($instruction:literal, $rounds:expr) => {
        // SAFETY: called only where `Isa::detect` saw tiles. The tiles are configured before and
        // released after, by this block, and nothing of the compiler's lives in them; zero rounds
        // would wrap, so there is at least one.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                concat!($instruction, " tmm0, tmm4, tmm6"),
                concat!($instruction, " tmm1, tmm4, tmm7"),
                concat!($instruction, " tmm2, tmm5, tmm6"),
                concat!($instruction, " tmm3, tmm5, tmm7"),
                "dec {rounds}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &raw const CONFIG,
                rounds = inout(reg) $rounds.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    };
}

pub(super) fn int8(rounds: usize) {
    rounds_of!("tdpbusd", rounds);
}

pub(super) fn bf16(rounds: usize) {
    rounds_of!("tdpbf16ps", rounds);
}
