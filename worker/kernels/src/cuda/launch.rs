//! One launch of a kernel: its name, its geometry and its arguments.

use super::memory::{Buffer, Number, View};

/// A kernel of `worker/kernels/cuda`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    /// Of a block; what the source says of it.
    pub(crate) threads: u32,
}

/// How many blocks, and the memory that each shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) grid: [u32; 3],
    pub(crate) shared_bytes: u32,
}

impl Geometry {
    pub(crate) fn new(x: usize, y: usize, z: usize) -> Self {
        // What a card takes: 2^31 - 1 blocks along x, 65535 along the others.
        let fits = x < 1 << 31 && y <= 65535 && z <= 65535;
        assert!(fits, "a grid of {x} by {y} by {z} blocks");
        Self { grid: [x as u32, y as u32, z as u32], shared_bytes: 0 }
    }

    /// What every card gives a block, if it is asked to.
    pub(crate) const MOST_SHARED: usize = 99 << 10;

    pub(crate) fn shared_floats(self, n: usize) -> Self {
        assert!(4 * n <= Self::MOST_SHARED, "{n} shared floats");
        Self { shared_bytes: 4 * n as u32, ..self }
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(self) -> bool {
        self.grid.contains(&0)
    }
}

const MAX_ARGUMENTS: usize = 16;
const MAX_BYTES: usize = 384;

/// The arguments of a launch, by value, in order. Lives on the stack: a step allocates nothing.
#[derive(Clone)]
pub(crate) struct Arguments {
    bytes: Aligned,
    ends: [u16; MAX_ARGUMENTS],
    begins: [u16; MAX_ARGUMENTS],
    n: usize,
}

#[derive(Clone)]
#[repr(align(16))]
struct Aligned([u8; MAX_BYTES]);

/// What a kernel takes as one argument that is a structure there: as many words.
pub(crate) trait Words {
    fn words(&self) -> &[u64];
}

impl Arguments {
    pub(crate) fn new() -> Self {
        let bytes = Aligned([0; MAX_BYTES]);
        Self { bytes, ends: [0; MAX_ARGUMENTS], begins: [0; MAX_ARGUMENTS], n: 0 }
    }

    pub(crate) fn memory<T: Number>(self, buffer: &Buffer<T>) -> Self {
        self.push(&buffer.address().to_ne_bytes(), 8)
    }

    pub(crate) fn view<T: Number>(self, view: View<'_, T>) -> Self {
        self.push(&view.address().to_ne_bytes(), 8)
    }

    /// A pointer that may be null.
    pub(crate) fn memory_or_null<T: Number>(self, buffer: Option<&Buffer<T>>) -> Self {
        self.push(&buffer.map_or(0, Buffer::address).to_ne_bytes(), 8)
    }

    /// A pointer that may be null.
    pub(crate) fn view_or_null<T: Number>(self, view: Option<View<'_, T>>) -> Self {
        self.push(&view.map_or(0, |view| view.address()).to_ne_bytes(), 8)
    }

    pub(crate) fn number(self, number: usize) -> Self {
        let number = u32::try_from(number).expect("sizes of a step fit 32 bits");
        self.push(&number.to_ne_bytes(), 4)
    }

    pub(crate) fn float(self, number: f32) -> Self {
        self.push(&number.to_ne_bytes(), 4)
    }

    /// A structure of pointers and, behind them, pairs of 32-bit numbers.
    pub(crate) fn structure(self, of: &impl Words) -> Self {
        let words = of.words();
        let mut bytes = [0; MAX_BYTES];
        for (word, to) in words.iter().zip(bytes.as_chunks_mut().0) {
            *to = word.to_ne_bytes();
        }
        self.push(&bytes[..8 * words.len()], 8)
    }

    fn push(mut self, bytes: &[u8], align: usize) -> Self {
        let last = self.n.checked_sub(1).map_or(0, |last| self.ends[last] as usize);
        let begin = last.next_multiple_of(align);
        let end = begin + bytes.len();
        assert!(self.n < MAX_ARGUMENTS && end <= MAX_BYTES, "argument {} does not fit", self.n);
        self.bytes.0[begin..end].copy_from_slice(bytes);
        (self.begins[self.n], self.ends[self.n]) = (begin as u16, end as u16);
        self.n += 1;
        self
    }

    pub(crate) fn len(&self) -> usize {
        self.n
    }

    /// Bytes of each.
    pub(crate) fn sizes(&self) -> [u32; MAX_ARGUMENTS] {
        std::array::from_fn(|i| u32::from(self.ends[i] - self.begins[i]))
    }

    /// Where each lies, for a call that reads them through pointers; those beyond `len` are null.
    pub(crate) fn pointers(&mut self) -> [*mut std::ffi::c_void; MAX_ARGUMENTS] {
        let (n, begins) = (self.n, self.begins);
        let bytes = &mut self.bytes.0;
        std::array::from_fn(|i| match i < n {
            true => (&raw mut bytes[begins[i] as usize]).cast(),
            false => std::ptr::null_mut(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_stand_where_they_are_aligned() {
        struct Two;
        impl Words for Two {
            fn words(&self) -> &[u64] {
                &[7, 9]
            }
        }
        let mut arguments = Arguments::new().number(1).structure(&Two).float(2.5).number(3);
        assert_eq!(arguments.len(), 4);
        assert_eq!(arguments.sizes()[..5], [4, 16, 4, 4, 0]);
        assert_eq!(arguments.begins[..4], [0, 8, 24, 28]);
        assert!(arguments.pointers()[4..].iter().all(|pointer| pointer.is_null()));
        assert_eq!(arguments.bytes.0[8], 7);
        assert_eq!(arguments.bytes.0[24..28], 2.5f32.to_ne_bytes());
    }

    #[test]
    #[should_panic(expected = "a grid of 1 by 65536 by 1")]
    fn a_grid_that_no_card_takes_is_a_bug() {
        let _ = Geometry::new(1, 65536, 1);
    }
}
