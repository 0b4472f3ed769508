//! Memory of a device: typed, owned, freed on drop.

use std::marker::PhantomData;

use super::{Device, Error};

/// A number that lies in device memory as it lies here.
pub trait Number: Copy + Default + 'static {
    /// Numbers as bytes.
    fn bytes(numbers: &[Self]) -> &[u8];
    fn bytes_mut(numbers: &mut [Self]) -> &mut [u8];
}

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Number for $type {
            fn bytes(numbers: &[Self]) -> &[u8] {
                // SAFETY: a plain number; every byte of it is initialised, and u8 has no alignment.
                unsafe {
                    std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers))
                }
            }

            fn bytes_mut(numbers: &mut [Self]) -> &mut [u8] {
                // SAFETY: as above, and any bytes are such a number.
                unsafe {
                    std::slice::from_raw_parts_mut(
                        numbers.as_mut_ptr().cast(),
                        size_of_val(numbers),
                    )
                }
            }
        }
    )*};
}
number!(u8, u16, u32, f32);

/// `len` numbers on a device. Nothing is known of what they are before something was written.
#[derive(Debug)]
pub struct Buffer<T: Number> {
    device: Device,
    address: u64,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Number> Buffer<T> {
    pub(super) fn new(device: &Device, len: usize) -> Result<Self, Error> {
        // An empty buffer still has a place, so that no kernel gets a null pointer by accident.
        let bytes = (len * size_of::<T>()).max(16);
        let address = device.driver().allocate(bytes)?;
        Ok(Self { device: device.clone(), address, len, of: PhantomData })
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Writes numbers from `at` on, after what was asked of the device before.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn upload(&self, at: usize, numbers: &[T]) -> Result<(), Error> {
        assert!(at + numbers.len() <= self.len, "{at} + {} of {}", numbers.len(), self.len);
        match numbers.is_empty() {
            true => Ok(()),
            false => self
                .device
                .driver()
                .upload(self.address + (at * size_of::<T>()) as u64, T::bytes(numbers)),
        }
    }

    /// Reads numbers from `at` on, once what was asked of the device before is done.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn download(&self, at: usize, numbers: &mut [T]) -> Result<(), Error> {
        assert!(at + numbers.len() <= self.len, "{at} + {} of {}", numbers.len(), self.len);
        match numbers.is_empty() {
            true => Ok(()),
            false => self
                .device
                .driver()
                .download(self.address + (at * size_of::<T>()) as u64, T::bytes_mut(numbers)),
        }
    }

    /// Makes all numbers zero.
    ///
    /// # Errors
    /// The device failed.
    pub fn clear(&self) -> Result<(), Error> {
        self.device.driver().clear(self.address, self.len * size_of::<T>())
    }

    /// Copies `n` numbers from `from` of `other` to `to` of this buffer.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// If a range is beyond its buffer, or both are the same memory and overlap.
    pub fn copy(&self, to: usize, other: &Self, from: usize, n: usize) -> Result<(), Error> {
        assert!(to + n <= self.len && from + n <= other.len, "a copy within the buffers");
        let apart = self.address != other.address || to + n <= from || from + n <= to;
        assert!(apart, "a copy onto itself");
        let bytes = |count: usize| (count * size_of::<T>()) as u64;
        if n == 0 {
            return Ok(());
        }
        self.device.driver().copy(
            self.address + bytes(to),
            other.address + bytes(from),
            n * size_of::<T>(),
        )
    }
}

/// Some numbers of a buffer, one behind the other.
#[derive(Debug)]
pub struct View<'a, T: Number> {
    pub(crate) buffer: &'a Buffer<T>,
    pub(crate) at: usize,
    pub(crate) len: usize,
}

impl<T: Number> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Number> Copy for View<'_, T> {}

impl<T: Number> Buffer<T> {
    /// Numbers `at..at + len`.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn view(&self, at: usize, len: usize) -> View<'_, T> {
        assert!(at + len <= self.len, "{at} + {len} of {}", self.len);
        View { buffer: self, at, len }
    }
}

impl<T: Number> View<'_, T> {
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address + (self.at * size_of::<T>()) as u64
    }
}

impl<T: Number> Drop for Buffer<T> {
    fn drop(&mut self) {
        self.device.driver().free(self.address);
    }
}
