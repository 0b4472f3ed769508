//! Tells two files apart without reading either whole: ranks of one group must hold the same one.

use sha2::{Digest, Sha256};

use super::gguf::Gguf;

const SAMPLE_BYTES: usize = 64 << 10;
const N_SAMPLES: usize = 64;

/// Hex SHA-256 over the file's length, its header, metadata and tensor table, and 4 MiB of samples
/// spread evenly over its data. Guards against mix-ups, not against malice.
pub(super) fn of(gguf: &Gguf) -> String {
    let (table, data) = gguf.bytes().split_at(gguf.table_end());
    let mut hash = Sha256::new();
    hash.update((gguf.bytes().len() as u64).to_le_bytes());
    hash.update(table);
    if data.len() <= SAMPLE_BYTES * N_SAMPLES {
        hash.update(data);
    } else {
        let last = data.len() - SAMPLE_BYTES;
        for sample in 0..N_SAMPLES {
            let start = (last as u128 * sample as u128 / (N_SAMPLES - 1) as u128) as usize;
            hash.update(&data[start..start + SAMPLE_BYTES]);
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
