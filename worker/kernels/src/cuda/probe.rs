//! What of CUDA is on this machine. Asks by itself for nothing but its libraries, so it may be called
//! anywhere.

use cudarc::driver::{result, sys};

use super::{compiler, nccl};

pub use super::Error;
pub use super::compiler::Arch;

/// What is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The driver and its cards, or why there are none.
    pub cards: Result<Vec<Card>, Error>,
    /// Of the driver, such as (13, 0): the newest CUDA it runs.
    pub driver: Option<(i32, i32)>,
    /// NVRTC, which compiles the kernels.
    pub compiler: Option<(i32, i32)>,
    /// cublasLt, for large products of bf16.
    pub has_cublas: bool,
    /// NCCL, for groups over cards.
    pub nccl: Option<(u32, u32, u32)>,
}

/// One card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    pub name: String,
    pub arch: Arch,
    pub memory_bytes: u64,
    pub n_multiprocessors: usize,
}

/// Looks.
#[must_use]
pub fn look() -> Found {
    // SAFETY: opens a library and runs nothing of it but its initialisation.
    let has_cublas = unsafe { cudarc::cublaslt::sys::is_culib_present() };
    Found {
        cards: n_cards().and_then(|n| (0..n).map(card).collect()),
        driver: driver_version(),
        compiler: compiler::version(),
        has_cublas,
        // Since 2.9 the number is major * 10000 + minor * 100 + patch.
        nccl: nccl::version().map(|n| (n / 10_000, n / 100 % 100, n % 100)),
    }
}

/// Cards that the driver sees.
///
/// # Errors
/// There is no driver, or it does not start.
pub fn n_cards() -> Result<usize, Error> {
    if !has_driver() {
        return Err(Error::NoDriver);
    }
    result::init().map_err(|error| match error.0 {
        sys::cudaError_enum::CUDA_ERROR_NO_DEVICE => Error::NoCard { ordinal: 0, n_cards: 0 },
        _ => Error::driver("cuInit", error),
    })?;
    let n = result::device::get_count();
    Ok(n.map_err(|error| Error::driver("cuDeviceGetCount", error))? as usize)
}

fn has_driver() -> bool {
    // SAFETY: opens a library and runs nothing of it but its initialisation.
    unsafe { sys::is_culib_present() }
}

fn driver_version() -> Option<(i32, i32)> {
    if !has_driver() {
        return None;
    }
    let mut version = 0;
    // SAFETY: the library is there; it writes one number.
    let answered = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    answered.ok().map(|()| (version / 1000, version % 1000 / 10))
}

fn card(ordinal: usize) -> Result<Card, Error> {
    let failed = |error| Error::driver("asking a card", error);
    let device = result::device::get(ordinal as i32).map_err(failed)?;
    let name = result::device::get_name(device).map_err(failed)?;
    // SAFETY: a device that the driver just gave.
    let memory = unsafe { result::device::total_mem(device) }.map_err(failed)?;
    let (arch, n_multiprocessors) = (arch(device)?, n_multiprocessors(device)?);
    Ok(Card { name, arch, memory_bytes: memory as u64, n_multiprocessors })
}

pub(super) fn n_multiprocessors(device: sys::CUdevice) -> Result<usize, Error> {
    use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    // SAFETY: the caller's device is the driver's.
    let n =
        unsafe { result::device::get_attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) };
    Ok(n.map_err(|error| Error::driver("asking a card", error))? as usize)
}

pub(super) fn arch(device: sys::CUdevice) -> Result<Arch, Error> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    };
    let ask = |attribute| {
        // SAFETY: the caller's device is the driver's.
        unsafe { result::device::get_attribute(device, attribute) }
            .map_err(|error| Error::driver("asking a card", error))
    };
    Ok(Arch {
        major: ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        minor: ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_says_so() {
        let found = look();
        // Whatever this machine has, both ways of asking agree.
        assert_eq!(found.cards.is_err(), n_cards().is_err());
        if found.driver.is_none() {
            assert_eq!(found.cards, Err(Error::NoDriver));
            assert!(Error::NoDriver.to_string().contains("--device cpu"));
        }
    }
}
