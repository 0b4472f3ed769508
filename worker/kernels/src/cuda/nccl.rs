//! NCCL, by its non-blocking calls: one membership of a card's queue in a group of cards.
//!
//! One thread calls it. It gives up by `ncclCommAbort`, never by finalising, which would wait for
//! members that may be gone.

use std::cell::Cell;
use std::ffi::{CStr, c_char};

use cudarc::driver::sys::CUstream;
use cudarc::nccl::result::{self, NcclError, NcclStatus};
use cudarc::nccl::sys;

use super::Error;
use super::group::{ID_BYTES, Id, Member};

/// What `nccl.h` calls NCCL_CONFIG_UNDEF_INT: the library's own choice.
const UNDEFINED: i32 = i32::MIN;
/// What marks a configuration as one, and the version of its layout: that of the bindings.
const MAGIC: u32 = 0xcafe_beef;
const LAYOUT_VERSION: u32 = 23000;

/// The library's version, major * 10000 + minor * 100 + patch; none if it is not there.
pub(super) fn version() -> Option<u32> {
    // SAFETY: opens a library and runs nothing of it but its initialisation.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    result::get_nccl_version().ok().and_then(|version| u32::try_from(version).ok())
}

/// Whether the library takes several members on one card: from 2.30 on, where its user asks for it.
pub(super) fn shares_cards(version: u32) -> bool {
    version >= 23000 && std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|asked| asked == "1")
}

/// Names a group; the library listens for its members from now on.
pub(super) fn new_id() -> Result<Id, Error> {
    let id = result::get_uniqueid().map_err(|error| failed("ncclGetUniqueId", &error))?;
    Ok(Id(id.internal.map(|c| c as u8)))
}

pub(super) struct Nccl {
    comm: Cell<sys::ncclComm_t>,
    stream: CUstream,
}

// SAFETY: a handle that any one thread may use at a time; it is not `Sync`.
unsafe impl Send for Nccl {}

impl Nccl {
    /// Begins to join, with the context that is current.
    ///
    /// # Safety
    /// The stream is of that context, and outlives the membership.
    pub(super) unsafe fn join(
        id: &Id,
        rank: usize,
        world_size: usize,
        stream: CUstream,
    ) -> Result<Self, Error> {
        let mut comm = std::ptr::null_mut();
        let id = sys::ncclUniqueId { internal: id.0.map(|byte| byte as c_char) };
        let mut config = config();
        // SAFETY: it copies the configuration, and sets the handle.
        let begun = unsafe {
            result::comm_init_rank_config(
                &mut comm,
                world_size as i32,
                id,
                rank as i32,
                &mut config,
            )
        };
        let joining = Self { comm: Cell::new(comm), stream };
        begun.map_err(|error| failed("ncclCommInitRankConfig", &error))?;
        Ok(joining)
    }
}

/// Non-blocking; all else is the library's choice.
fn config() -> sys::ncclConfig_t {
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: MAGIC,
        version: LAYOUT_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
        graphUsageMode: UNDEFINED,
        numRmaCtx: UNDEFINED,
        maxP2pPeers: UNDEFINED,
    }
}

impl Member for Nccl {
    fn is_ready(&self) -> Result<bool, Error> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: a handle that was not given up: whoever gives it up drops it.
        unsafe { sys::ncclCommGetAsyncError(self.comm.get(), &mut state) }
            .result()
            .map_err(|error| failed("ncclCommGetAsyncError", &error))?;
        match state.result() {
            Ok(NcclStatus::InProgress) => Ok(false),
            Ok(NcclStatus::Success | NcclStatus::NumResults) => Ok(true),
            Err(error) => Err(failed("a sum of cards", &error)),
        }
    }

    unsafe fn all_reduce(&self, address: u64, n: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise; in place is what the library allows.
        let queued = unsafe {
            result::all_reduce(
                address as *const _,
                address as *mut _,
                n,
                sys::ncclDataType_t::ncclFloat32,
                sys::ncclRedOp_t::ncclSum,
                self.comm.get(),
                self.stream.cast(),
            )
        };
        queued.map(drop).map_err(|error| failed("ncclAllReduce", &error))
    }

    fn leave(&self) {
        let comm = self.comm.replace(std::ptr::null_mut());
        if !comm.is_null() {
            // SAFETY: the handle, given up once. Whether that worked, nobody can use.
            let _ = unsafe { result::comm_abort(comm) };
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.leave();
    }
}

/// With the library's own last words.
fn failed(what: &'static str, error: &NcclError) -> Error {
    // SAFETY: without a handle it gives the thread's last message, a text that ends in zero, or null.
    let words = unsafe {
        let text = sys::ncclGetLastError(std::ptr::null_mut());
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    };
    Error::driver(what, format!("{:?} {}", error.0, words.unwrap_or_default().trim()))
}

const _: () = assert!(size_of::<sys::ncclUniqueId>() == ID_BYTES);
