//! Large products of bf16 matrices by cublasLt, where that library is found.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver;

use super::Error;
use super::device::Gemm;

/// What NVIDIA advises for Hopper; cards before it use less.
const WORKSPACE_BYTES: usize = 32 << 20;

/// The library, its workspace, and the algorithm it chose for each shape so far. It belongs to the
/// context that was current when it was opened.
pub(super) struct Cublas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: HashMap<[usize; 6], Plan>,
}

/// One shape's descriptions.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3], // of w, x, out
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn failed(what: &'static str) -> impl Fn(CublasError) -> Error {
    move |error| Error::driver(what, error)
}

impl Cublas {
    /// None if the library is not there.
    pub(super) fn open() -> Result<Option<Self>, Error> {
        // SAFETY: opens a library and runs nothing of it but its initialisation.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let handle = result::create_handle().map_err(failed("cublasLtCreate"))?;
        // SAFETY: memory of which nothing is expected.
        let workspace = unsafe { driver::result::malloc_sync(WORKSPACE_BYTES) }
            .map_err(|error| Error::Memory { bytes: WORKSPACE_BYTES, detail: error.to_string() })?;
        Ok(Some(Self { handle, workspace, plans: HashMap::new() }))
    }

    /// # Safety
    /// The memory is there and of that shape; the context is current, and the stream of it.
    pub(super) unsafe fn multiply(
        &mut self,
        gemm: &Gemm,
        stream: driver::sys::CUstream,
    ) -> Result<(), Error> {
        let Gemm { rows, tokens, columns, w_stride, x_stride, out_stride, .. } = *gemm;
        let key = [rows, tokens, columns, w_stride, x_stride, out_stride];
        if !self.plans.contains_key(&key) {
            let plan = Plan::new(self.handle, gemm)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let (one, of_out) = (1f32, if gemm.adds { 1f32 } else { 0f32 });
        let [w, x, out] = plan.layouts;
        // SAFETY: descriptions that live in `plans`; the rest is the caller's promise.
        unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const of_out).cast(),
                gemm.w as *const c_void,
                w,
                gemm.x as *const c_void,
                x,
                gemm.out as *const c_void,
                out,
                gemm.out as *mut c_void,
                out,
                &raw const plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(failed("cublasLtMatmul"))
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: both were made by `open`; its owner has waited for the stream.
        unsafe {
            let _ = result::destroy_handle(self.handle);
            let _ = driver::result::free_sync(self.workspace);
        }
    }
}

impl Plan {
    /// The library counts rows within columns: to it w is [columns, rows], taken transposed, x is
    /// [columns, tokens], and the product [rows, tokens].
    fn new(handle: sys::cublasLtHandle_t, gemm: &Gemm) -> Result<Self, Error> {
        use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        use sys::cudaDataType::{CUDA_R_16BF, CUDA_R_32F};
        let (rows, tokens, columns) = (gemm.rows as u64, gemm.tokens as u64, gemm.columns as u64);
        let product =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)
                .map_err(failed("cublasLtMatmulDescCreate"))?;
        let transposed: i32 = 1; // CUBLAS_OP_T
        // SAFETY: the attribute is a number of four bytes, which the library copies.
        unsafe {
            result::set_matmul_desc_attribute(
                product,
                CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )
        }
        .map_err(failed("cublasLtMatmulDescSetAttribute"))?;
        let layout = |kind, rows, columns, stride| {
            result::create_matrix_layout(kind, rows, columns, stride as i64)
                .map_err(failed("cublasLtMatrixLayoutCreate"))
        };
        let layouts = [
            layout(CUDA_R_16BF, columns, rows, gemm.w_stride)?,
            layout(CUDA_R_16BF, columns, tokens, gemm.x_stride)?,
            layout(CUDA_R_32F, rows, tokens, gemm.out_stride)?,
        ];
        let preference =
            result::create_matmul_pref().map_err(failed("cublasLtMatmulPreferenceCreate"))?;
        let most = WORKSPACE_BYTES;
        // SAFETY: as above, of eight bytes; descriptions made here and not destroyed yet.
        let algorithm = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const most).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                let [w, x, out] = layouts;
                result::get_matmul_algo_heuristic(handle, product, w, x, out, out, preference)
            })
        };
        // SAFETY: made above, used no more.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        let algorithm = algorithm.map_err(failed("cublasLtMatmulAlgoGetHeuristic"))?.algo;
        Ok(Self { product, layouts, algorithm })
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.product);
        }
    }
}
