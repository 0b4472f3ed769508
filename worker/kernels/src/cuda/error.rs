//! Why a device cannot be used, or failed.

/// Each sentence says what would work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "there is no NVIDIA driver here (libcuda.so.1 is not found); install one, or use --device \
         cpu"
    )]
    NoDriver,
    #[error("cuda:{ordinal} is not there: the driver sees {n_cards} cards")]
    NoCard { ordinal: usize, n_cards: usize },
    #[error(
        "{card} has compute capability {major}.{minor}; Evener's kernels need 8.0 or newer (Ampere)"
    )]
    TooOld { card: String, major: i32, minor: i32 },
    #[error(
        "the kernels are not compiled for {arch} yet, and NVRTC is not found; install it (pip: \
         nvidia-cuda-nvrtc; CUDA 13: libnvrtc.so.13) where the loader looks, or name its directory \
         in EVENER_NVRTC"
    )]
    NoCompiler { arch: String },
    #[error("the kernels do not compile for {arch}: {log}")]
    Compile { arch: String, log: String },
    #[error("{bytes} bytes of device memory are not to be had: {detail}")]
    Memory { bytes: usize, detail: String },
    #[error(
        "NCCL is not found (as libnccl.so; a link to libnccl.so.2 where the loader looks does)"
    )]
    NoNccl,
    #[error("{what} failed: {detail}")]
    Driver { what: &'static str, detail: String },
}

impl Error {
    pub(super) fn driver(what: &'static str, detail: impl std::fmt::Display) -> Self {
        Self::Driver { what, detail: detail.to_string() }
    }
}
