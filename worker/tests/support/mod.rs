//! What the worker's tests share: the real model file, and tiny random models as GGUF bytes.

#![allow(dead_code, clippy::unwrap_used)]

pub mod gguf_writer;
pub mod group;
pub mod logits;
pub mod serving;
pub mod tiny_model;

use std::path::PathBuf;

/// The demo model's file; a test that needs it fails with the command that fetches it.
pub fn real_model() -> PathBuf {
    let path = match std::env::var_os("EVENER_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("../.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    assert!(
        path.is_file(),
        "{} is missing: run scripts/fetch-model, or set EVENER_TEST_MODEL to a copy of it",
        path.display()
    );
    path
}
