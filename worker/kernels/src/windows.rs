//! Columns in windows, for kernels that keep the sums of many tiles and rows while a window of
//! activations and weights is near: where windows begin, and what becomes of a leaf's sums.

use std::ops::Range;

use crate::activation::BLOCK;
use crate::linear::Sum;

/// Some blocks of 32 columns of one leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) blocks: Range<usize>,
    /// How many come before it.
    pub(crate) idx: usize,
    pub(crate) begins_leaf: bool,
    /// If it ends a leaf.
    pub(crate) leaf_end: Option<LeafEnd>,
}

/// What becomes of a leaf's sum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeafEnd {
    /// Places of the sums that it is added to, the last first; then it takes the first one's.
    pub(crate) left: Range<usize>,
    pub(crate) part: usize,
    /// It is the sum of its part, and takes no place.
    pub(crate) is_whole: bool,
}

/// All windows of up to `len` blocks.
pub(crate) fn windows<'a>(
    sum: &'a Sum<'_>,
    len: usize,
) -> impl Iterator<Item = Window> + Clone + 'a {
    let leaf_blocks = sum.leaf_columns / BLOCK;
    let starts = (0..sum.merges.len())
        .flat_map(move |leaf| (0..leaf_blocks).step_by(len).map(move |start| (leaf, start)));
    let mut place = Place::default();
    starts.enumerate().map(move |(idx, (leaf, start))| {
        let (first, end) = (leaf * leaf_blocks, leaf_blocks.min(start + len));
        let leaf_end = (end == leaf_blocks).then(|| place.leaf_end(sum));
        Window { blocks: first + start..first + end, idx, begins_leaf: start == 0, leaf_end }
    })
}

/// How far the sums have come.
#[derive(Clone, Default)]
struct Place {
    leaf: usize,
    part: usize,
    /// Leaves of the part that are done.
    in_part: usize,
    /// Sums that wait for others.
    top: usize,
}

impl Place {
    fn leaf_end(&mut self, sum: &Sum<'_>) -> LeafEnd {
        let merges = usize::from(sum.merges[self.leaf]);
        self.leaf += 1;
        self.in_part += 1;
        while sum.part_leaves[self.part] == 0 {
            self.part += 1;
        }
        let is_whole = self.in_part == sum.part_leaves[self.part];
        let end = LeafEnd { left: self.top - merges..self.top, part: self.part, is_whole };
        if is_whole {
            (self.part, self.in_part, self.top) = (self.part + 1, 0, 0);
        } else {
            self.top = end.left.start + 1;
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_end_with_leaves_and_leaves_merge_into_parts() {
        let sum = Sum { leaf_columns: 96, part_leaves: &[0, 3, 1], merges: &[0, 1, 1, 0] };
        let leaf_end = |left, part, is_whole| Some(LeafEnd { left, part, is_whole });
        let expect = [
            (0..2, None),
            (2..3, leaf_end(0..0, 1, false)),
            (3..5, None),
            (5..6, leaf_end(0..1, 1, false)),
            (6..8, None),
            (8..9, leaf_end(0..1, 1, true)),
            (9..11, None),
            (11..12, leaf_end(0..0, 2, true)),
        ];
        let expect = expect.into_iter().enumerate().map(|(idx, (blocks, leaf_end))| {
            let begins_leaf = idx % 2 == 0;
            Window { blocks, idx, begins_leaf, leaf_end }
        });
        assert!(windows(&sum, 2).eq(expect));
    }
}
