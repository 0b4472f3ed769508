//! A device that is none: the kernels compiled by this machine's C++ compiler, their threads run in
//! turn (`cuda/emulator.hpp`). Tests run the CUDA backend on it, op by op and as a whole.
//!
//! It holds what a card would forgive or hide: fresh memory is NaN, a write beyond a buffer ends the
//! process, arguments must be as many and as large as the kernel's, and recorded work keeps its
//! arguments, so that what a graph may not change cannot change here either.

use std::alloc::Layout;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::{CStr, CString, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

use super::device::{Driver, Gemm, Recorded};
use super::emulated_group::{self, Seat};
use super::group::{Id, Introduction, Member};
use super::launch::{Arguments, Geometry, Kernel};
use super::source::{Formats, Shape, for_emulator};
use super::{Error, kernels};

/// Bytes before and behind every allocation that nobody may write.
const GUARD: usize = 256;
/// Floats of it are NaN.
const POISON: u8 = 0xff;

/// Emulated devices of this process so far.
static N_OPENED: AtomicU64 = AtomicU64::new(0);

#[derive(Clone)]
pub(super) struct Emulator(Arc<Inner>);

struct Inner {
    /// In the world.
    number: u64,
    functions: HashMap<&'static str, Function>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the address of what was given out: its bytes.
    allocations: BTreeMap<u64, usize>,
    /// While recording.
    recording: Option<Vec<Task>>,
    /// Behind a sum whose other members have not come to it yet; else empty.
    queue: VecDeque<Task>,
    n_launches: u32,
}

/// `emulator::Launch` of the C++ side.
#[repr(C)]
struct Launch {
    grid: [u32; 3],
    size: [u32; 3],
    shared_bytes: u32,
    seed: u32,
    n_arguments: u32,
    argument_bytes: *const u32,
    arguments: *const *mut c_void,
}

type Function = unsafe extern "C" fn(*const Launch) -> i32;

#[derive(Clone)]
enum Task {
    Launch(Kernel, Geometry, Box<Arguments>),
    Copy { to: u64, from: u64, bytes: usize },
    Gemm(Gemm),
    AllReduce { seat: Arc<Seat>, address: u64, n: usize },
}

struct Recording(Emulator, Vec<Task>);

impl Emulator {
    pub(super) fn open(shape: Shape, cache: Option<PathBuf>) -> Result<Self, Error> {
        let library = library(shape, &cache.unwrap_or_else(std::env::temp_dir))?;
        let path = CString::new(library.as_os_str().as_encoded_bytes())
            .map_err(|error| Error::driver("the path of the emulated kernels", error))?;
        // SAFETY: a path that ends in zero; the library runs no code when it is loaded but the
        // construction of its own statics. It stays loaded for the life of the process.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        if handle.is_null() {
            // SAFETY: after a failure dlerror gives a text that ends in zero.
            let why = unsafe { CStr::from_ptr(libc::dlerror()) };
            return Err(Error::driver("loading the emulated kernels", why.to_string_lossy()));
        }
        let mut functions = HashMap::new();
        for kernel in kernels::all(shape) {
            let name = CString::new(format!("emulate_{}", kernel.name)).expect("a plain name");
            // SAFETY: a handle that is open, a name that ends in zero.
            let symbol = unsafe { libc::dlsym(handle, name.as_ptr()) };
            assert!(!symbol.is_null(), "the library was compiled with `{}`", kernel.name);
            // SAFETY: `library` generated it with this signature.
            let function = unsafe { std::mem::transmute::<*mut c_void, Function>(symbol) };
            functions.insert(kernel.name, function);
        }
        let number = N_OPENED.fetch_add(1, Ordering::Relaxed);
        Ok(Self(Arc::new(Inner { number, functions, state: Mutex::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does it now or when its turn comes, or notes it while recording.
    fn take(&self, task: Task) {
        let mut state = self.state();
        match &mut state.recording {
            Some(tasks) => tasks.push(task),
            None => {
                state.queue.push_back(task);
                self.go_on(&mut state);
            }
        }
    }

    /// As far as other devices let it.
    fn go_on(&self, state: &mut State) {
        while let Some(task) = state.queue.pop_front() {
            if let Task::AllReduce { seat, address, n } = &task {
                state.find(*address, 4 * n);
                // SAFETY: within an allocation, as just found; the state is locked.
                let numbers = unsafe { std::slice::from_raw_parts_mut(*address as *mut f32, *n) };
                if !seat.sum(numbers) {
                    return state.queue.push_front(task);
                }
            } else {
                self.run(state, task);
            }
        }
    }

    fn run(&self, state: &mut State, task: Task) {
        match task {
            Task::Launch(kernel, geometry, mut arguments) => {
                state.n_launches = state.n_launches.wrapping_add(1);
                let (sizes, pointers) = (arguments.sizes(), arguments.pointers());
                let launch = Launch {
                    grid: geometry.grid,
                    size: [kernel.threads, 1, 1],
                    shared_bytes: geometry.shared_bytes,
                    seed: state.n_launches,
                    n_arguments: arguments.len() as u32,
                    argument_bytes: sizes.as_ptr(),
                    arguments: pointers.as_ptr(),
                };
                let function = self.0.functions.get(kernel.name);
                let function = function.unwrap_or_else(|| panic!("no kernel {}", kernel.name));
                // SAFETY: sizes and pointers live until it returns; it reads no argument before it
                // has compared their number and sizes. That the kernel stays within its memory is
                // the promise of `launch`'s caller.
                let refused = unsafe { function(&launch) };
                assert_eq!(refused, 0, "{}: arguments of other number or size", kernel.name);
                state.check_guards(kernel.name);
            }
            Task::Copy { to, from, bytes } => {
                state.find(to, bytes);
                state.find(from, bytes);
                // SAFETY: both lie within allocations, as just found; they may overlap.
                unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
            }
            Task::Gemm(gemm) => state.multiply(&gemm),
            Task::AllReduce { .. } => unreachable!("`go_on` does it"),
        }
    }
}

impl State {
    /// Panics unless so many bytes from `address` on are within one allocation.
    fn find(&self, address: u64, bytes: usize) {
        let below = self.allocations.range(..=address).next_back();
        let fits = below.is_some_and(|(&first, &len)| address + bytes as u64 <= first + len as u64);
        assert!(fits, "{bytes} bytes at {address:#x} are not device memory");
    }

    fn check_guards(&self, kernel: &str) {
        for (&address, &bytes) in &self.allocations {
            let before = (address as usize - GUARD) as *const u8;
            // SAFETY: `allocate` made the guards with the allocation.
            let guards = unsafe {
                [
                    std::slice::from_raw_parts(before, GUARD),
                    std::slice::from_raw_parts((address as usize + bytes) as *const u8, GUARD),
                ]
            };
            let is_whole = guards.iter().all(|guard| guard.iter().all(|&byte| byte == POISON));
            assert!(is_whole, "{kernel} wrote beyond a buffer of {bytes} bytes");
        }
    }

    fn multiply(&self, gemm: &Gemm) {
        let Gemm { w, x, out, rows, tokens, columns, w_stride, x_stride, out_stride, adds } = *gemm;
        for (matrix, n, stride) in [(w, rows, w_stride), (x, tokens, x_stride)] {
            self.find(matrix, 2 * (n.saturating_sub(1) * stride + columns));
        }
        self.find(out, 4 * (tokens.saturating_sub(1) * out_stride + rows));
        let number = |matrix: u64, at: usize| {
            // SAFETY: within the allocation found above; aligned, for both are multiples of two.
            let bits = unsafe { *(matrix as *const u16).add(at) };
            f32::from_bits(u32::from(bits) << 16)
        };
        for token in 0..tokens {
            for row in 0..rows {
                let product = |k| number(x, token * x_stride + k) * number(w, row * w_stride + k);
                let sum: f32 = (0..columns).map(product).sum();
                // SAFETY: as above.
                let to = unsafe { &mut *(out as *mut f32).add(token * out_stride + row) };
                *to = if adds { *to + sum } else { sum };
            }
        }
    }
}

fn layout(bytes: usize) -> Layout {
    // 256 bytes is how a card aligns what it gives.
    Layout::from_size_align(bytes + 2 * GUARD, GUARD).expect("sizes of tests are small")
}

impl Driver for Emulator {
    fn name(&self) -> String {
        "an emulated card".to_owned()
    }

    fn memory(&self) -> Result<[u64; 2], Error> {
        Ok([1 << 30, 2 << 30])
    }

    fn allocate(&self, bytes: usize) -> Result<u64, Error> {
        let mut state = self.state();
        assert!(state.recording.is_none(), "nothing is allocated while recording");
        // SAFETY: the layout is not empty; all of it is written at once.
        let address = unsafe {
            let first = std::alloc::alloc(layout(bytes));
            assert!(!first.is_null(), "no memory for {bytes} bytes");
            std::ptr::write_bytes(first, POISON, bytes + 2 * GUARD);
            first.add(GUARD) as u64
        };
        state.allocations.insert(address, bytes);
        Ok(address)
    }

    fn free(&self, address: u64) {
        let bytes = self.state().allocations.remove(&address);
        let bytes = bytes.expect("memory is freed once, by its buffer");
        // SAFETY: `allocate` got it with this layout.
        unsafe { std::alloc::dealloc((address as usize - GUARD) as *mut u8, layout(bytes)) };
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        let state = self.state();
        assert!(state.recording.is_none(), "nothing is uploaded while recording");
        assert!(state.queue.is_empty(), "whoever queues sums waits before it uploads");
        state.find(to, bytes.len());
        // SAFETY: within an allocation, as just found, which is no memory of the caller's slice.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let state = self.state();
        assert!(state.recording.is_none(), "nothing is downloaded while recording");
        assert!(state.queue.is_empty(), "whoever queues sums waits before it downloads");
        state.find(from, bytes.len());
        // SAFETY: as in `upload`.
        unsafe {
            std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len())
        };
        Ok(())
    }

    fn clear(&self, address: u64, bytes: usize) -> Result<(), Error> {
        let state = self.state();
        assert!(state.recording.is_none(), "nothing is cleared while recording");
        state.find(address, bytes);
        // SAFETY: within an allocation, as just found.
        unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes) };
        Ok(())
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        self.take(Task::Copy { to, from, bytes });
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        geometry: Geometry,
        arguments: &mut Arguments,
    ) -> Result<(), Error> {
        self.take(Task::Launch(kernel, geometry, Box::new(arguments.clone())));
        Ok(())
    }

    fn n_multiprocessors(&self) -> usize {
        3 // few, so that blocks take several tiles
    }

    fn has_gemm(&self) -> bool {
        true
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), Error> {
        self.take(Task::Gemm(*gemm));
        Ok(())
    }

    fn begin_capture(&self) -> Result<(), Error> {
        let before = self.state().recording.replace(Vec::new());
        assert!(before.is_none(), "one recording at a time");
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Recorded>, Error> {
        let tasks = self.state().recording.take().expect("it was begun");
        Ok(Box::new(Recording(self.clone(), tasks)))
    }

    fn synchronise(&self) -> Result<(), Error> {
        assert!(self.is_idle()?, "whoever queues sums waits for them with a clock");
        Ok(())
    }

    fn is_idle(&self) -> Result<bool, Error> {
        let mut state = self.state();
        self.go_on(&mut state);
        Ok(state.queue.is_empty())
    }

    fn introduction(&self) -> Result<Option<Introduction>, Error> {
        let mut card = [0; 16];
        card[..8].copy_from_slice(&self.0.number.to_ne_bytes());
        Ok(Some(Introduction { version: 1, card, shares: false }))
    }

    fn name_group(&self) -> Result<Id, Error> {
        Ok(emulated_group::new_id())
    }

    fn join(&self, id: &Id, rank: usize, world_size: usize) -> Result<Box<dyn Member>, Error> {
        let seat = Arc::new(Seat::take(id, rank, world_size));
        Ok(Box::new(Membership { emulator: self.clone(), seat }))
    }
}

struct Membership {
    emulator: Emulator,
    seat: Arc<Seat>,
}

impl Member for Membership {
    fn is_ready(&self) -> Result<bool, Error> {
        Ok(self.seat.is_complete())
    }

    unsafe fn all_reduce(&self, address: u64, n: usize) -> Result<(), Error> {
        assert!(self.seat.is_complete(), "a sum before all have joined");
        self.emulator.take(Task::AllReduce { seat: self.seat.clone(), address, n });
        Ok(())
    }

    fn leave(&self) {
        self.seat.leave();
        self.emulator.go_on(&mut self.emulator.state());
    }
}

impl Recorded for Recording {
    fn replay(&self) -> Result<(), Error> {
        for task in &self.1 {
            self.0.take(task.clone());
        }
        Ok(())
    }
}

/// The kernels as a shared library under `cache`, compiled if it is not there yet.
fn library(shape: Shape, cache: &Path) -> Result<PathBuf, Error> {
    // One library for all formats: it is compiled for tests, which use them all.
    let shape = Shape { formats: Formats::ALL, ..shape };
    let mut source = for_emulator();
    for kernel in kernels::all(shape) {
        let name = kernel.name;
        source.push_str(&format!(
            "extern \"C\" int emulate_{name}(const emulator::Launch* launch) {{ return \
             emulator::call({name}, launch); }}\n"
        ));
    }
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let mut options: Vec<String> = [
        "-std=c++20",
        "-O2",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE", // it would take a jump between stacks for a mistake
        "-fPIC",
        "-shared",
        "-w",
    ]
    .map(str::to_owned)
    .into();
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("fma") {
        options.push("-mfma".to_owned()); // else fmaf is a slow function
    }
    options.extend(shape.definitions());
    let mut hash = Sha256::new();
    for part in [&source, &compiler].into_iter().chain(&options) {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let name: String = hash.finalize().iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    let library = cache.join(format!("evener-emulated-{name}.so"));
    if library.exists() {
        return Ok(library);
    }
    // One compiles, others of its process and of other processes wait; where locks do not work, two
    // compile, both make the same, and the last rename wins.
    let own = cache.join(format!("evener-emulated-{name}-{}-{:?}", std::process::id(), thread()));
    let (text, made) = (own.with_extension("cpp"), own.with_extension("so.part"));
    let failed = |what, error: std::io::Error| Error::driver(what, error);
    std::fs::create_dir_all(cache).map_err(|error| failed("making the kernel cache", error))?;
    let locked = std::fs::File::create(library.with_extension("lock"));
    if let Ok(file) = &locked {
        let _ = file.lock(); // until `locked` is dropped
    }
    if library.exists() {
        return Ok(library);
    }
    std::fs::write(&text, source).map_err(|error| failed("writing the kernels", error))?;
    let output = Command::new(&compiler).args(&options).arg("-o").arg(&made).arg(&text).output();
    let _ = std::fs::remove_file(&text);
    let output = output.map_err(|error| Error::Driver {
        what: "starting the C++ compiler (CXX, else c++)",
        detail: format!("{compiler}: {error}; the emulator needs one, such as g++"),
    })?;
    if !output.status.success() {
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::Compile { arch: "the emulator".to_owned(), log });
    }
    std::fs::rename(&made, &library).map_err(|error| failed("keeping the kernels", error))?;
    Ok(library)
}

fn thread() -> std::thread::ThreadId {
    std::thread::current().id()
}
