//! Where the things under test are: the repository, the built binary, the demo model.

use std::path::{Path, PathBuf};

/// The repository.
#[must_use]
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository")
}

/// The binary that the same build left beside this test's own executable.
///
/// # Panics
/// It is not there.
#[must_use]
pub fn evener() -> PathBuf {
    let own = std::env::current_exe().expect("a test knows its own path");
    // target/<profile>/deps/<test> beside target/<profile>/evener.
    let profile = own.parent().and_then(Path::parent).expect("tests run in target/<profile>/deps");
    let binary = profile.join("evener");
    assert!(
        binary.is_file(),
        "{} is not built; run `cargo build -p evener`, or `make test`, which builds it first",
        binary.display()
    );
    binary
}

/// The demo model's file.
///
/// # Panics
/// It has not been fetched.
#[must_use]
pub fn model() -> PathBuf {
    let path = std::env::var_os("EVENER_TEST_MODEL").map_or_else(
        || root().join(".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    assert!(path.is_file(), "{} is missing; run `make model`", path.display());
    path
}
