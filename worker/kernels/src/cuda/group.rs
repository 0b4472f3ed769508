//! Devices that sum among themselves, without their hosts: NCCL between cards, its like between
//! emulated ones.
//!
//! Nothing here waits. Sums stand in the device's queue until all members have asked for theirs; who
//! waits for that looks with [`Group::is_idle`] and at a clock, and ends it with [`Group::leave`].

use super::memory::Buffer;
use super::{Device, Error};

/// What a device tells others of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Introduction {
    /// Version of the library that would sum: all must have the same.
    pub version: u32,
    /// The card's own number in the world.
    pub card: [u8; 16],
    /// Whether several members may share the card.
    pub shares: bool,
}

/// Bytes of an [`Id`].
pub const ID_BYTES: usize = 128;

/// Names a group that is to be, to all its members. Whoever knows it could be one: it travels only
/// between them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Id(pub [u8; ID_BYTES]);

/// What a membership is to this crate.
pub(super) trait Member: Send {
    /// Whether the last call has done its part on the host; there is no other before it has.
    fn is_ready(&self) -> Result<bool, Error>;
    /// Queues the sum of all members' `n` floats at `address`, in place.
    ///
    /// # Safety
    /// There are so many.
    unsafe fn all_reduce(&self, address: u64, n: usize) -> Result<(), Error>;
    /// Gives up what is queued. What it would have written is then unknown.
    fn leave(&self);
}

/// A device's place in a group of them. Dropping it leaves the group.
pub struct Group {
    device: Device,
    member: Box<dyn Member>,
}

impl Group {
    pub(super) fn new(device: Device, member: Box<dyn Member>) -> Self {
        Self { device, member }
    }

    /// Whether the group takes the next sum; at first, whether all have joined.
    ///
    /// # Errors
    /// The library failed, here or at another member.
    pub fn is_ready(&self) -> Result<bool, Error> {
        self.member.is_ready()
    }

    /// Queues: the first `n` numbers become those of all members added up, in an order that the
    /// library chooses. To be asked in the same order by all, and only when it is ready.
    ///
    /// # Errors
    /// The library failed.
    ///
    /// # Panics
    /// If there are not so many, or they are another device's.
    pub fn all_reduce(&self, numbers: &Buffer<f32>, n: usize) -> Result<(), Error> {
        assert!(n <= numbers.len(), "{n} of {}", numbers.len());
        assert!(numbers.device().is(&self.device), "a sum of another device's numbers");
        // SAFETY: as many as asserted.
        unsafe { self.member.all_reduce(numbers.address(), n) }
    }

    /// Whether all that was asked of the device is done. Unlike [`Device::synchronise`] it does not
    /// wait, which could be for ever.
    ///
    /// # Errors
    /// The library or the device failed.
    pub fn is_idle(&self) -> Result<bool, Error> {
        Ok(self.member.is_ready()? && self.device.driver().is_idle()?)
    }

    /// Gives up sums that other members did not ask for; the device's queue moves on.
    pub fn leave(self) {}
}

impl Drop for Group {
    fn drop(&mut self) {
        self.member.leave();
    }
}
