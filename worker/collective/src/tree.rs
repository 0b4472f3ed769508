//! The fixed order in which canonical chunks are summed, and what each rank adds where (pure).
//!
//! A sum in f32 depends on its order. The tree fixes one, whoever owns which leaves: a rank that
//! owns a whole subtree sends its one sum, and the ranks' parts are combined by what is left of the
//! tree.

use std::iter;
use std::ops::Range;

/// A binary tree over leaves `0..n_leaves`; the value of a node is left + right, in f32.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumTree {
    nodes: Vec<Node>, // children before parents, the root last
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    leaves: Range<usize>,
    children: Option<[usize; 2]>, // left, right; none at a leaf
}

impl SumTree {
    /// Splits n leaves at ceil(n / 2), and so on downwards. At least one leaf.
    pub fn balanced(n_leaves: usize) -> Self {
        Self::nested(&[n_leaves])
    }

    /// Balanced over groups, each balanced over its own leaves. Groups without leaves do not count.
    pub fn nested(groups: &[usize]) -> Self {
        let mut tree = Self { nodes: Vec::new() };
        let mut n_leaves = 0;
        let mut roots = Vec::new();
        for &group in groups.iter().filter(|&&group| group > 0) {
            let leaves: Vec<usize> = (n_leaves..n_leaves + group)
                .map(|leaf| tree.push(Node { leaves: leaf..leaf + 1, children: None }))
                .collect();
            n_leaves += group;
            roots.push(tree.join(&leaves));
        }
        assert!(!roots.is_empty(), "a sum needs at least one leaf");
        tree.join(&roots);
        tree
    }

    fn join(&mut self, nodes: &[usize]) -> usize {
        if let [one] = nodes {
            return *one;
        }
        let (left, right) = nodes.split_at(nodes.len().div_ceil(2));
        let children = [self.join(left), self.join(right)];
        let leaves = self.nodes[children[0]].leaves.start..self.nodes[children[1]].leaves.end;
        self.push(Node { leaves, children: Some(children) })
    }

    fn push(&mut self, node: Node) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn root(&self) -> usize {
        self.nodes.len() - 1
    }

    pub fn n_leaves(&self) -> usize {
        self.nodes[self.root()].leaves.end
    }

    /// The maximal subtrees inside `range`, left to right, as ranges of leaves.
    pub fn parts(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut parts = Vec::new();
        self.collect_parts(self.root(), &range, &mut parts);
        parts
    }

    fn collect_parts(&self, node: usize, range: &Range<usize>, parts: &mut Vec<Range<usize>>) {
        let Node { leaves, children } = &self.nodes[node];
        if leaves.start >= range.end || leaves.end <= range.start {
            return;
        }
        if range.start <= leaves.start && leaves.end <= range.end {
            return parts.push(leaves.clone());
        }
        for &child in children.iter().flatten() {
            self.collect_parts(child, range, parts);
        }
    }

    /// How to sum the subtree that covers exactly `part` with a stack: push each leaf in order, and
    /// after the i-th do this, `result[i]` times: pop right, pop left, push left + right. One value
    /// is left.
    ///
    /// Panics if no subtree covers exactly `part`.
    pub fn merges(&self, part: Range<usize>) -> Vec<u8> {
        let node = self.nodes.iter().position(|node| node.leaves == part);
        let node = node.unwrap_or_else(|| panic!("no subtree covers exactly the leaves {part:?}"));
        let mut merges = Vec::with_capacity(part.len());
        self.collect_merges(node, &|node| node.children.is_none(), &mut merges);
        merges
    }

    /// Post-order below `node`, stopping at nodes for which `is_given`.
    fn collect_merges(&self, node: usize, is_given: &dyn Fn(&Node) -> bool, merges: &mut Vec<u8>) {
        let children = self.nodes[node].children.filter(|_| !is_given(&self.nodes[node]));
        let Some([left, right]) = children else {
            return merges.push(0);
        };
        self.collect_merges(left, is_given, merges);
        self.collect_merges(right, is_given, merges);
        *merges.last_mut().expect("the right child pushed an entry") += 1;
    }
}

/// Where an addition finds an operand: a rank's part, or the slot it was left in by an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Part(usize),
    Slot(usize),
}

/// slot[into] = left + right. A slot operand on the left is slot `into` itself, on the right `into
/// + 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Add {
    pub into: usize,
    pub left: Operand,
    pub right: Operand,
}

/// Which parts each rank sends, and how all ranks' parts become the root. Equal on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReducePlan {
    parts: Vec<Vec<Range<usize>>>, // by rank: the leaves of each part
    first_parts: Vec<usize>,       // by rank, counting all ranks' parts; then their number
    adds: Vec<Add>,                // slot 0 ends as the sum; empty if there is one part
    n_slots: usize,
}

impl ReducePlan {
    /// The ranges are contiguous, in rank order, and cover all leaves; some may be empty. Panics if
    /// not: whoever cuts shards guarantees it.
    pub fn new(tree: &SumTree, ranges_by_rank: &[Range<usize>]) -> Self {
        let mut end = 0;
        for range in ranges_by_rank.iter().filter(|range| !range.is_empty()) {
            assert_eq!(range.start, end, "ranges are contiguous and in rank order");
            end = range.end;
        }
        assert_eq!(end, tree.n_leaves(), "the ranges cover all leaves");
        let parts: Vec<Vec<Range<usize>>> =
            ranges_by_rank.iter().map(|range| tree.parts(range.clone())).collect();
        let given: Vec<&Range<usize>> = parts.iter().flatten().collect();
        let is_given = |node: &Node| {
            given
                .binary_search_by_key(&(node.leaves.start, node.leaves.end), |part| {
                    (part.start, part.end)
                })
                .is_ok()
        };
        let mut merges = Vec::with_capacity(given.len());
        tree.collect_merges(tree.root(), &is_given, &mut merges);
        Self::compile(parts, &merges)
    }

    /// One part a rank, summed in rank order: for sums in which only one rank's value is not zero.
    pub fn any_order(world_size: usize) -> Self {
        assert!(world_size > 0, "a group has at least one rank");
        let parts = (0..world_size).map(|rank| iter::once(rank..rank + 1).collect()).collect();
        let merges: Vec<u8> = (0..world_size).map(|rank| u8::from(rank > 0)).collect();
        Self::compile(parts, &merges)
    }

    fn compile(parts: Vec<Vec<Range<usize>>>, merges: &[u8]) -> Self {
        let mut first_parts = vec![0];
        let mut n_parts = 0;
        for of_rank in &parts {
            n_parts += of_rank.len();
            first_parts.push(n_parts);
        }
        assert_eq!(n_parts, merges.len(), "every part is pushed once");
        let mut adds = Vec::with_capacity(n_parts - 1);
        let mut stack: Vec<Operand> = Vec::new();
        for (part, &n_merges) in merges.iter().enumerate() {
            stack.push(Operand::Part(part));
            for _ in 0..n_merges {
                let right = stack.pop().expect("a merge has two operands");
                let left = stack.pop().expect("a merge has two operands");
                adds.push(Add { into: stack.len(), left, right });
                stack.push(Operand::Slot(stack.len()));
            }
        }
        assert_eq!(stack.len(), 1, "one sum is left");
        let n_slots = adds.iter().map(|add| add.into + 1).max().unwrap_or(1);
        Self { parts, first_parts, adds, n_slots }
    }

    pub fn world_size(&self) -> usize {
        self.parts.len()
    }

    pub fn n_parts(&self, rank: usize) -> usize {
        self.parts[rank].len()
    }

    /// The leaves of each part that `rank` sums and hands to `all_reduce`, in that order.
    pub fn parts(&self, rank: usize) -> &[Range<usize>] {
        &self.parts[rank]
    }

    /// The most parts any rank sends.
    pub fn max_parts(&self) -> usize {
        self.parts.iter().map(Vec::len).max().unwrap_or(0)
    }

    pub(crate) fn n_parts_of_all(&self) -> usize {
        self.first_parts[self.parts.len()]
    }

    /// The parts of `rank`, counted over all ranks.
    pub(crate) fn part_range(&self, rank: usize) -> Range<usize> {
        self.first_parts[rank]..self.first_parts[rank + 1]
    }

    pub(crate) fn adds(&self) -> &[Add] {
        &self.adds
    }

    pub(crate) fn n_slots(&self) -> usize {
        self.n_slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // one range is what is meant
    fn parts_are_the_maximal_subtrees_of_a_range() {
        let check = |tree: &SumTree, range: Range<usize>, expected: &[Range<usize>]| {
            assert_eq!(tree.parts(range.clone()), expected, "{range:?}");
        };
        let nine = SumTree::balanced(9); // ((2+1)+2)+(2+2)
        check(&nine, 0..9, &[0..9]);
        check(&nine, 0..6, &[0..5, 5..6]);
        check(&nine, 6..9, &[6..7, 7..9]);
        check(&nine, 2..7, &[2..3, 3..5, 5..7]);
        check(&nine, 4..4, &[]);
        let nested = SumTree::nested(&[3, 0, 1, 2]);
        check(&nested, 0..4, &[0..4]);
        check(&nested, 1..6, &[1..2, 2..3, 3..4, 4..6]);
    }

    #[test]
    fn merges_are_the_tree_in_post_order() {
        assert_eq!(SumTree::balanced(1).merges(0..1), [0]);
        assert_eq!(SumTree::balanced(4).merges(0..4), [0, 1, 0, 2]);
        assert_eq!(SumTree::balanced(5).merges(0..5), [0, 1, 1, 0, 2]);
        assert_eq!(SumTree::balanced(9).merges(5..9), [0, 1, 0, 2]);
        assert_eq!(SumTree::nested(&[2, 3]).merges(2..5), [0, 1, 1]);
    }

    #[test]
    fn ranks_without_leaves_send_nothing() {
        let plan = ReducePlan::new(&SumTree::balanced(4), &[0..0, 0..3, 3..3, 3..4]);
        let n_parts: Vec<usize> = (0..4).map(|rank| plan.n_parts(rank)).collect();
        assert_eq!(n_parts, [0, 2, 0, 1]);
        assert_eq!(plan.parts(1), [0..2, 2..3]);
    }

    #[test]
    #[should_panic(expected = "cover all leaves")]
    fn ranges_that_leave_leaves_out_are_a_bug() {
        ReducePlan::new(&SumTree::balanced(4), &[0..1, 1..3]);
    }

    #[test]
    #[should_panic(expected = "contiguous")]
    fn ranges_that_overlap_are_a_bug() {
        ReducePlan::new(&SumTree::balanced(4), &[0..3, 2..4]);
    }
}
