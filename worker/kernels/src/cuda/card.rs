//! A card: the driver's calls, behind the contract of `device.rs`.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::compiler::{self, Arch};
use super::cublas::Cublas;
use super::device::{Driver, Gemm, Recorded};
use super::group::{Id, Introduction, Member};
use super::launch::{Arguments, Geometry, Kernel};
use super::source::Shape;
use super::{Error, kernels, nccl, probe};

/// The oldest compute capability whose tensor cores multiply bf16.
const OLDEST: Arch = Arch { major: 8, minor: 0 };

/// What fresh memory is filled with.
const POISON: u8 = 0xff;

#[derive(Clone)]
pub(super) struct Card(Arc<Inner>);

struct Inner {
    name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    module: sys::CUmodule,
    functions: HashMap<&'static str, sys::CUfunction>,
    /// Whether a kernel may begin before the last has ended (`depend` of device.cuh).
    overlaps: bool,
    n_multiprocessors: usize,
    /// None where the library is not there.
    cublas: Option<Mutex<Cublas>>,
}

// SAFETY: handles of the driver, which locks what its threads share; every call first makes the
// context current on the calling thread, and cublasLt's handle is behind a lock.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

fn failed(what: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| Error::driver(what, error)
}

impl Card {
    pub(super) fn open(
        ordinal: usize,
        shape: Shape,
        cache: Option<PathBuf>,
    ) -> Result<Self, Error> {
        let n_cards = probe::n_cards()?;
        if ordinal >= n_cards {
            return Err(Error::NoCard { ordinal, n_cards });
        }
        let device = result::device::get(ordinal as i32).map_err(failed("cuDeviceGet"))?;
        let name = result::device::get_name(device).map_err(failed("cuDeviceGetName"))?;
        let arch = probe::arch(device)?;
        if (arch.major, arch.minor) < (OLDEST.major, OLDEST.minor) {
            return Err(Error::TooOld { card: name, major: arch.major, minor: arch.minor });
        }
        let image = compiler::kernels(arch, shape, cache.as_deref())?;
        // SAFETY: a device that the driver just gave.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let opened = Self::with_context(name, device, context, &image, shape, arch);
        if opened.is_err() {
            // SAFETY: retained above, once.
            let _ = unsafe { result::primary_ctx::release(device) };
        }
        opened
    }

    fn with_context(
        name: String,
        device: sys::CUdevice,
        context: sys::CUcontext,
        image: &[u8],
        shape: Shape,
        arch: Arch,
    ) -> Result<Self, Error> {
        // SAFETY: a context that is retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed("cuCtxSetCurrent"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("cuStreamCreate"))?;
        // SAFETY: a cubin, whole, that outlives the call.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map_err(failed("cuModuleLoadData"))?;
        let mut functions = HashMap::new();
        for kernel in kernels::all(shape) {
            let entry = CString::new(kernel.name).expect("a plain name");
            // SAFETY: the module was just loaded.
            let function = unsafe { result::module::get_function(module, entry) }
                .map_err(failed("cuModuleGetFunction"))?;
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            unsafe {
                result::function::set_function_attribute(
                    function,
                    attribute,
                    Geometry::MOST_SHARED as i32,
                )
            }
            .map_err(failed("cuFuncSetAttribute"))?;
            functions.insert(kernel.name, function);
        }
        let cublas = Cublas::open()?.map(Mutex::new);
        let inner = Inner {
            name,
            device,
            context,
            stream,
            module,
            functions,
            overlaps: arch.major >= 9,
            n_multiprocessors: probe::n_multiprocessors(device)?,
            cublas,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Makes the card's context that of the calling thread.
    fn bind(&self) -> Result<(), Error> {
        // SAFETY: the context is retained until the last handle is dropped.
        unsafe { result::ctx::set_current(self.0.context) }.map_err(failed("cuCtxSetCurrent"))
    }
}

impl Driver for Card {
    fn name(&self) -> String {
        self.0.name.clone()
    }

    fn memory(&self) -> Result<[u64; 2], Error> {
        self.bind()?;
        let (free, total) = result::mem_get_info().map_err(failed("cuMemGetInfo"))?;
        Ok([free as u64, total as u64])
    }

    fn allocate(&self, bytes: usize) -> Result<u64, Error> {
        self.bind()?;
        // SAFETY: the caller takes it as memory of which nothing is known.
        let address = unsafe { result::malloc_sync(bytes) }
            .map_err(|error| Error::Memory { bytes, detail: error.to_string() })?;
        // What is read before it is written shall be seen: as floats, these bytes are NaN.
        // SAFETY: the memory just given, whole.
        unsafe { result::memset_d8_async(address, POISON, bytes, self.0.stream) }
            .map_err(failed("cuMemsetD8Async"))?;
        Ok(address)
    }

    fn free(&self, address: u64) {
        // Work on it may still be running; nothing helps if the card has failed.
        let _ = self.synchronise();
        // SAFETY: `allocate` gave it, and its buffer frees it once.
        let _ = unsafe { result::free_sync(address) };
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: within a buffer, as it asserted. From pageable memory the driver has taken the
        // bytes over when the call returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.0.stream) }
            .map_err(failed("cuMemcpyHtoDAsync"))
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: within a buffer, as it asserted; the bytes are borrowed until all is done.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.0.stream) }
            .map_err(failed("cuMemcpyDtoHAsync"))?;
        self.synchronise()
    }

    fn clear(&self, address: u64, bytes: usize) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: a buffer, whole, as it says.
        unsafe { result::memset_d8_async(address, 0, bytes, self.0.stream) }
            .map_err(failed("cuMemsetD8Async"))
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: within buffers, as they asserted.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.0.stream) }
            .map_err(failed("cuMemcpyDtoDAsync"))
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        geometry: Geometry,
        arguments: &mut Arguments,
    ) -> Result<(), Error> {
        self.bind()?;
        let function = self.0.functions.get(kernel.name);
        let function = *function.unwrap_or_else(|| panic!("no kernel {}", kernel.name));
        let [x, y, z] = geometry.grid;
        let mut pointers = arguments.pointers();
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: Default::default(),
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: geometry.shared_bytes,
            hStream: self.0.stream,
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.0.overlaps),
        };
        // SAFETY: the caller's promise; the driver copies the arguments and all that the
        // configuration names before it returns.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(failed(kernel.name))
    }

    fn n_multiprocessors(&self) -> usize {
        self.0.n_multiprocessors
    }

    fn has_gemm(&self) -> bool {
        self.0.cublas.is_some()
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), Error> {
        self.bind()?;
        let cublas = self.0.cublas.as_ref().expect("the caller asked whether it is there");
        let mut cublas = cublas.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise; the context is current.
        unsafe { cublas.multiply(gemm, self.0.stream) }
    }

    fn begin_capture(&self) -> Result<(), Error> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the card.
        unsafe { result::stream::begin_capture(self.0.stream, mode) }
            .map_err(failed("cuStreamBeginCapture"))
    }

    fn end_capture(&self) -> Result<Box<dyn Recorded>, Error> {
        self.bind()?;
        // SAFETY: as above.
        let graph = unsafe { result::stream::end_capture(self.0.stream) }
            .map_err(failed("cuStreamEndCapture"))?;
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph was just made, and is not needed once it is instantiated.
        let (runnable, _) =
            unsafe { (result::graph::instantiate(graph, flags), result::graph::destroy(graph)) };
        let runnable = runnable.map_err(failed("cuGraphInstantiate"))?;
        Ok(Box::new(Recording { card: self.clone(), runnable }))
    }

    fn synchronise(&self) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: the stream lives as long as the card.
        unsafe { result::stream::synchronize(self.0.stream) }.map_err(failed("cuStreamSynchronize"))
    }

    fn is_idle(&self) -> Result<bool, Error> {
        self.bind()?;
        // SAFETY: as above.
        match unsafe { sys::cuStreamQuery(self.0.stream) } {
            sys::cudaError_enum::CUDA_ERROR_NOT_READY => Ok(false),
            answer => answer.result().map(|()| true).map_err(failed("cuStreamQuery")),
        }
    }

    fn introduction(&self) -> Result<Option<Introduction>, Error> {
        let Some(version) = nccl::version() else { return Ok(None) };
        let uuid = result::device::get_uuid(self.0.device).map_err(failed("cuDeviceGetUuid"))?;
        let card = uuid.bytes.map(|c| c as u8);
        Ok(Some(Introduction { version, card, shares: nccl::shares_cards(version) }))
    }

    fn name_group(&self) -> Result<Id, Error> {
        self.bind()?;
        nccl::version().ok_or(Error::NoNccl).and_then(|_| nccl::new_id())
    }

    fn join(&self, id: &Id, rank: usize, world_size: usize) -> Result<Box<dyn Member>, Error> {
        nccl::version().ok_or(Error::NoNccl)?;
        self.bind()?;
        // SAFETY: the stream lives as long as the card, of which the group has a handle.
        Ok(Box::new(unsafe { nccl::Nccl::join(id, rank, world_size, self.0.stream) }?))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: all of it was made by `with_context`, and nobody else has a handle any more. What
        // a failed card answers is of no use.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::synchronize(self.stream);
            self.cublas = None;
            let _ = result::module::unload(self.module);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

struct Recording {
    card: Card,
    runnable: sys::CUgraphExec,
}

// SAFETY: a handle of the driver, used by one thread at a time.
unsafe impl Send for Recording {}

impl Recorded for Recording {
    fn replay(&self) -> Result<(), Error> {
        self.card.bind()?;
        // SAFETY: the graph lives as long as this; the memory it names, its owner promised.
        unsafe { result::graph::launch(self.runnable, self.card.0.stream) }
            .map_err(failed("cuGraphLaunch"))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let _ = self.card.synchronise();
        // SAFETY: made by `end_capture`, dropped once.
        let _ = unsafe { result::graph::exec_destroy(self.runnable) };
    }
}
