//! One device and its one queue: memory, kernels and graphs on a card, or on its emulation by this
//! machine's processor.
//!
//! What is asked of a device is done in the order in which it is asked. Kernels are launched by
//! `ops`, which knows what each reads and writes.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::group::{Group, Id, Introduction, Member};
use super::launch::{Arguments, Geometry, Kernel};
use super::memory::{Buffer, Number};
use super::source::Shape;
use super::{Error, card, emulator};

/// Which device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// The driver's card of this number.
    Card(usize),
    /// Kernels compiled for this machine's processor, threads run in turn: for tests.
    Emulator,
}

/// A handle on a device; cheap to clone.
#[derive(Clone)]
pub struct Device(Arc<dyn Driver>);

/// What a device is to this crate.
///
/// One engine thread uses it; it may be another at another time.
pub(super) trait Driver: Send + Sync {
    fn name(&self) -> String;
    /// Bytes free and in all.
    fn memory(&self) -> Result<[u64; 2], Error>;
    fn allocate(&self, bytes: usize) -> Result<u64, Error>;
    fn free(&self, address: u64);
    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Error>;
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Error>;
    /// Makes bytes zero.
    fn clear(&self, address: u64, bytes: usize) -> Result<(), Error>;
    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error>;
    /// # Safety
    /// The arguments are what the kernel takes, and its threads stay within their memory.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        geometry: Geometry,
        arguments: &mut Arguments,
    ) -> Result<(), Error>;
    fn n_multiprocessors(&self) -> usize;
    /// Whether `gemm` is there.
    fn has_gemm(&self) -> bool;
    /// `out[token][row] = sum over k of x[token][k] * w[row][k]`, bf16 in, f32 out.
    ///
    /// # Safety
    /// The memory is there and of that shape.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), Error>;
    fn begin_capture(&self) -> Result<(), Error>;
    fn end_capture(&self) -> Result<Box<dyn Recorded>, Error>;
    fn synchronise(&self) -> Result<(), Error>;
    /// Whether all that was asked is done.
    fn is_idle(&self) -> Result<bool, Error>;
    /// None where there is nothing that sums among devices.
    fn introduction(&self) -> Result<Option<Introduction>, Error>;
    fn name_group(&self) -> Result<Id, Error>;
    fn join(&self, id: &Id, rank: usize, world_size: usize) -> Result<Box<dyn Member>, Error>;
}

/// What was asked of a device between two moments, to be done again.
pub(super) trait Recorded: Send {
    fn replay(&self) -> Result<(), Error>;
}

/// A product of two matrices of bf16, by address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gemm {
    pub(super) w: u64,
    pub(super) x: u64,
    pub(super) out: u64,
    pub(super) rows: usize,
    pub(super) tokens: usize,
    pub(super) columns: usize,
    /// Numbers from a row of w to the next.
    pub(super) w_stride: usize,
    pub(super) x_stride: usize,
    pub(super) out_stride: usize,
    /// Whether to what is in `out`.
    pub(super) adds: bool,
}

/// Work that was recorded; its memory must outlive it.
pub struct Graph(Box<dyn Recorded>);

impl Device {
    /// Opens a device and makes its kernels for a model's shape. Compiled kernels are kept under
    /// `cache`, if there is one.
    ///
    /// # Errors
    /// It is not there, too old, or its kernels cannot be made.
    pub fn open(place: Place, shape: Shape, cache: Option<PathBuf>) -> Result<Self, Error> {
        Ok(Self(match place {
            Place::Card(ordinal) => Arc::new(card::Card::open(ordinal, shape, cache)?),
            Place::Emulator => Arc::new(emulator::Emulator::open(shape, cache)?),
        }))
    }

    /// "NVIDIA H200", or that it is emulated.
    #[must_use]
    pub fn name(&self) -> String {
        self.0.name()
    }

    /// Bytes that are free, and all.
    ///
    /// # Errors
    /// The device failed.
    pub fn memory(&self) -> Result<[u64; 2], Error> {
        self.0.memory()
    }

    /// Memory for `len` numbers.
    ///
    /// # Errors
    /// There is not so much.
    pub fn buffer<T: Number>(&self, len: usize) -> Result<Buffer<T>, Error> {
        Buffer::new(self, len)
    }

    /// Memory with these numbers.
    ///
    /// # Errors
    /// There is not so much, or the device failed.
    pub fn holding<T: Number>(&self, numbers: &[T]) -> Result<Buffer<T>, Error> {
        let buffer = self.buffer(numbers.len())?;
        buffer.upload(0, numbers)?;
        Ok(buffer)
    }

    /// Records what `work` asks of this device, instead of doing it: launches and copies within the
    /// device only.
    ///
    /// # Errors
    /// The work's, or the device cannot record.
    pub fn record<E: From<Error>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        self.0.begin_capture()?;
        let worked = work();
        let recorded = self.0.end_capture();
        worked?;
        Ok(Graph(recorded?))
    }

    /// Does again what was recorded.
    ///
    /// # Errors
    /// The device failed.
    pub fn replay(&self, graph: &Graph) -> Result<(), Error> {
        graph.0.replay()
    }

    /// Waits until all that was asked is done.
    ///
    /// # Errors
    /// The device failed, now or earlier.
    pub fn synchronise(&self) -> Result<(), Error> {
        self.0.synchronise()
    }

    /// What others must know of this device to sum with it; none if it cannot.
    ///
    /// # Errors
    /// The device failed.
    pub fn introduction(&self) -> Result<Option<Introduction>, Error> {
        self.0.introduction()
    }

    /// A name for a group of devices, for its members to [`Self::join`].
    ///
    /// # Errors
    /// There is no library, or it failed.
    pub fn name_group(&self) -> Result<Id, Error> {
        self.0.name_group()
    }

    /// Begins to join a group, as its `rank` of `world_size`.
    ///
    /// # Errors
    /// There is no library, or it failed.
    pub fn join(&self, id: &Id, rank: usize, world_size: usize) -> Result<Group, Error> {
        Ok(Group::new(self.clone(), self.0.join(id, rank, world_size)?))
    }

    pub(super) fn driver(&self) -> &dyn Driver {
        self.0.as_ref()
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}
