//! Numbers seen as bytes, for the wire. Nothing else reinterprets memory.

/// The bytes of `numbers`.
pub(crate) fn of(numbers: &[f32]) -> &[u8] {
    // SAFETY: every f32 is four initialised bytes, u8 has no alignment, and the lifetime is the
    // same.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// The bytes of `numbers`, to be written.
pub(crate) fn of_mut(numbers: &mut [f32]) -> &mut [u8] {
    // SAFETY: as above, and any four bytes are a valid f32.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}
