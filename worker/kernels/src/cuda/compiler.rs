//! NVRTC: the kernels' text to the machine code of one card, kept on disk.
//!
//! NVRTC reads no file: all of the text is here. What it made is found again by a hash of the text,
//! the options, NVRTC's own version and the architecture.

use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use super::Error;
use super::source::{Shape, for_cards};

/// What a card of one compute capability runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arch {
    pub major: i32,
    pub minor: i32,
}

impl Arch {
    #[must_use]
    pub fn name(self) -> String {
        format!("sm_{}{}", self.major, self.minor)
    }
}

/// Kernels compiled.
#[derive(Debug)]
pub struct Compiled {
    /// A cubin.
    pub image: Vec<u8>,
    /// What the compiler said: warnings, registers, spills.
    pub log: String,
}

/// The version of NVRTC, if it is found: in the directory that EVENER_NVRTC names, else where the
/// loader looks.
#[must_use]
pub fn version() -> Option<(i32, i32)> {
    static FOUND: OnceLock<Option<(i32, i32)>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        if let Some(dir) = std::env::var_os("EVENER_NVRTC") {
            look_in(Path::new(&dir));
        }
        // SAFETY: opens a library and runs nothing of it but its initialisation.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library is there; it writes two numbers.
        let found = unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result();
        found.ok().map(|()| (major, minor))
    })
}

/// Loads NVRTC from a directory, and the part of itself that it looks for by name, so that both are
/// found again. To be called before anything is compiled.
pub fn look_in(dir: &Path) {
    let mut libraries: Vec<PathBuf> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.starts_with("libnvrtc") && name.contains(".so") && !name.contains(".alt.")
        })
        .collect();
    libraries.sort(); // libnvrtc-builtins comes before libnvrtc.so
    for library in libraries {
        let Ok(path) = CString::new(library.as_os_str().as_encoded_bytes()) else { continue };
        // SAFETY: a path that ends in zero. What cannot be loaded is missed later, with a sentence.
        unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    }
}

/// The kernels of a shape for an architecture: from `cache`, or compiled and put there.
///
/// # Errors
/// NVRTC is not there, or does not take the text.
pub fn kernels(arch: Arch, shape: Shape, cache: Option<&Path>) -> Result<Vec<u8>, Error> {
    let stem = stem(arch, &for_cards(), &options(arch, shape));
    if let Some(image) = cache.and_then(|dir| kept(dir, &stem, version())) {
        return Ok(image);
    }
    let compiled = compile(arch, shape)?;
    if let (Some(dir), Some(version)) = (cache, version()) {
        // A cache that cannot be written costs the next start some seconds, no more.
        let _ = keep(dir, &file_name(&stem, version), &compiled.image);
    }
    Ok(compiled.image)
}

/// Compiles, whatever was kept.
///
/// # Errors
/// As for [`kernels`].
pub fn compile(arch: Arch, shape: Shape) -> Result<Compiled, Error> {
    if version().is_none() {
        return Err(Error::NoCompiler { arch: arch.name() });
    }
    let source = CString::new(for_cards()).expect("a text without zeros");
    let name = c"evener.cu";
    let program = result::create_program(&source, Some(name))
        .map_err(|error| Error::driver("nvrtcCreateProgram", error))?;
    let compiled = compiled(arch, shape, program);
    // SAFETY: made above, used no more; `source` outlives it.
    let _ = unsafe { result::destroy_program(program) };
    compiled
}

fn compiled(arch: Arch, shape: Shape, program: sys::nvrtcProgram) -> Result<Compiled, Error> {
    // SAFETY: the program was made and not yet destroyed.
    let worked = unsafe { result::compile_program(program, &options(arch, shape)) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
    let log = String::from_utf8_lossy(&log).into_owned();
    if worked.is_err() {
        return Err(Error::Compile { arch: arch.name(), log });
    }
    let failed = |error| Error::driver("nvrtcGetCUBIN", error);
    let mut n_bytes = 0;
    // SAFETY: as above; it writes one number.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut n_bytes) }.result().map_err(failed)?;
    let mut image = vec![0u8; n_bytes];
    // SAFETY: as above; it writes as many bytes as it just said.
    unsafe { sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast::<c_char>()) }
        .result()
        .map_err(failed)?;
    Ok(Compiled { image, log })
}

fn options(arch: Arch, shape: Shape) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={}", arch.name()),
        "--std=c++17".to_owned(),
        // Where a product is added without rounding in between, the code says so: the emulator and
        // every card compute the same.
        "--fmad=false".to_owned(),
        "--ptxas-options=-v".to_owned(),
    ];
    options.extend(shape.definitions());
    options
}

/// The beginning of a file's name, which says what was compiled.
fn stem(arch: Arch, source: &str, options: &[String]) -> String {
    let mut hash = Sha256::new();
    hash.update(source.as_bytes());
    for option in options {
        hash.update([0]);
        hash.update(option.as_bytes());
    }
    let hash: String = hash.finalize().iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    format!("evener-{}-{hash}", arch.name())
}

/// The whole name: by whom, too.
fn file_name(stem: &str, (major, minor): (i32, i32)) -> String {
    format!("{stem}-nvrtc-{major}.{minor}.cubin")
}

/// What this NVRTC made; what any made where there is none.
fn kept(dir: &Path, stem: &str, version: Option<(i32, i32)>) -> Option<Vec<u8>> {
    if let Some(version) = version {
        return std::fs::read(dir.join(file_name(stem, version))).ok();
    }
    let files = std::fs::read_dir(dir).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(stem) && name.ends_with(".cubin")
    };
    let mut files: Vec<PathBuf> = files.filter(is_ours).collect();
    files.sort();
    std::fs::read(files.last()?).ok()
}

/// Whole or not at all.
fn keep(dir: &Path, name: &str, image: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let part = dir.join(format!("{name}.{}.part", std::process::id()));
    std::fs::write(&part, image)?;
    std::fs::rename(part, dir.join(name))
}

#[cfg(test)]
mod tests {
    use super::super::source::Formats;
    use super::*;
    use crate::attention::Format;
    use crate::quant;

    const ARCH: Arch = Arch { major: 9, minor: 0 };
    const SHAPE: Shape = Shape { head_dim: 64, kv_format: Format::F16, formats: Formats::ALL };

    #[test]
    fn whatever_changes_the_code_changes_its_place_on_disk() {
        let name =
            |arch: Arch, shape: Shape, source: &str| stem(arch, source, &options(arch, shape));
        let base = name(ARCH, SHAPE, "a");
        assert_eq!(base, name(ARCH, SHAPE, "a"));
        assert!(base.starts_with("evener-sm_90-"), "{base}");
        assert_ne!(base, name(ARCH, SHAPE, "b"));
        assert_ne!(base, name(Arch { major: 10, minor: 0 }, SHAPE, "a"));
        assert_ne!(base, name(ARCH, Shape { head_dim: 128, ..SHAPE }, "a"));
        assert_ne!(base, name(ARCH, Shape { kv_format: Format::Int8, ..SHAPE }, "a"));
        let formats = Formats::from_iter([quant::Format::Q4_0]);
        assert_ne!(base, name(ARCH, Shape { formats, ..SHAPE }, "a"));
        assert_ne!(file_name(&base, (13, 0)), file_name(&base, (13, 1)));
    }

    #[test]
    fn what_was_kept_is_found_again() {
        let dir = std::env::temp_dir().join(format!("evener-kept-{}", std::process::id()));
        keep(&dir, &file_name("a", (13, 0)), b"code").expect("a temporary directory");
        let found = [("a", Some((13, 0))), ("a", Some((13, 1))), ("a", None), ("b", None)]
            .map(|(stem, version)| kept(&dir, stem, version));
        std::fs::remove_dir_all(&dir).expect("it was just made");
        let code = Some(b"code".to_vec());
        assert_eq!(found, [code.clone(), None, code, None]);
    }
}
