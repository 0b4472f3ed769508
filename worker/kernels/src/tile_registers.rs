//! The tile registers of AMX: eight of up to 16 rows of 64 bytes. Their instructions are written as
//! assembly, since the intrinsics are not stable.
//!
//! Measured, in cycles: a product of 16 rows takes 16 (of 8 rows, half), a load 8, a store 16. A
//! store right behind its product stalls the next one, one that misses the first-level cache costs
//! six times as much, and vectors of floats run at half their rate for some hundred nanoseconds
//! after any tile instruction.

use std::arch::asm;

/// Bytes of a full register.
pub(crate) const REGISTER: usize = 1024;

/// What `ldtilecfg` reads (Intel SDM, volume 1, table 18-1).
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The thread's registers while they are configured.
pub(crate) struct Registers(());

impl Registers {
    /// Gives each register rows and bytes of a row.
    ///
    /// # Safety
    /// The CPU has AMX, and the process has leave to use it.
    pub(crate) unsafe fn configure(shapes: [(usize, usize); 8]) -> Self {
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for (i, (rows, bytes)) in shapes.into_iter().enumerate() {
            configuration.rows[i] = rows as u8;
            configuration.row_bytes[i] = bytes as u16;
        }
        // SAFETY: by the caller's promise; the configuration is one of palette 1.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration,
                options(nostack, preserves_flags, readonly));
        }
        Self(())
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: they were configured, and nothing in them is wanted.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Reads a register from memory; rows are a stride apart.
macro_rules! load {
    ($tile:literal, $from:expr, $stride:expr) => {
        std::arch::asm!(
            concat!("tileloadd tmm", $tile, ", [{from} + {stride}]"),
            from = in(reg) $from, stride = in(reg) $stride,
            options(nostack, readonly, preserves_flags),
        )
    };
}

/// Writes a register to memory, rows of 64 bytes.
macro_rules! store {
    ($tile:literal, $to:expr) => {
        std::arch::asm!(
            concat!("tilestored [{to} + {stride}], tmm", $tile),
            to = in(reg) $to, stride = in(reg) 64usize,
            options(nostack, preserves_flags),
        )
    };
}

/// Clears registers.
macro_rules! zero {
    ($($tile:literal),+) => {
        std::arch::asm!($(concat!("tilezero tmm", $tile)),+, options(nostack, nomem, preserves_flags))
    };
}

/// `sum += a * b` of bytes by a named instruction: `tdpbssd`, `tdpbsud` (signed activations,
/// unsigned weights), ...
macro_rules! multiply {
    ($instruction:literal, $sum:literal, $a:literal, $b:literal) => {
        std::arch::asm!(
            concat!($instruction, " tmm", $sum, ", tmm", $a, ", tmm", $b),
            options(nostack, nomem, preserves_flags),
        )
    };
}

pub(crate) use {load, multiply, store, zero};
