//! Which KV blocks are free and which sequence holds which. Pure accounting: the memory is the
//! backend's.
//!
//! Only the lead rank keeps it; followers learn block ids from step plans. A block has a count of
//! holders, so that sequences with a common beginning can share blocks once prefixes are reused.

use crate::backend::KV_BLOCK_LEN;

/// The blocks of one sequence, in order of position, and how many more it may still take.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<u32>,
    /// Blocks promised to it and not yet taken.
    n_reserved: u32,
}

impl BlockTable {
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Tokens that the blocks taken so far can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.blocks.len() * KV_BLOCK_LEN
    }
}

/// All KV blocks of a group.
#[derive(Debug)]
pub struct KvBlocks {
    /// By block: sequences that hold it.
    n_holders: Vec<u32>,
    /// Last freed on top.
    free: Vec<u32>,
    /// Sum of `n_reserved` over all tables; never more than `free` holds.
    n_reserved: u32,
    /// Of `check_integrity`, by block: tables that hold it. Kept, so that checking allocates once.
    counted: Vec<u32>,
}

/// Blocks that `n_tokens` tokens need.
#[must_use]
pub fn blocks_for(n_tokens: usize) -> usize {
    n_tokens.div_ceil(KV_BLOCK_LEN)
}

impl KvBlocks {
    #[must_use]
    pub fn new(n_blocks: u32) -> Self {
        let free = (0..n_blocks).rev().collect();
        Self { n_holders: vec![0; n_blocks as usize], free, n_reserved: 0, counted: Vec::new() }
    }

    #[must_use]
    pub fn n_total(&self) -> u32 {
        self.n_holders.len() as u32
    }

    /// Blocks nobody holds and nobody was promised.
    #[must_use]
    pub fn n_available(&self) -> u32 {
        self.free.len() as u32 - self.n_reserved
    }

    /// Promises `n_blocks` to `table`; false, and nothing changed, if they are not there.
    #[must_use]
    pub fn reserve(&mut self, table: &mut BlockTable, n_blocks: usize) -> bool {
        if n_blocks > self.n_available() as usize {
            return false;
        }
        table.blocks.reserve_exact(n_blocks);
        table.n_reserved += n_blocks as u32;
        self.n_reserved += n_blocks as u32;
        true
    }

    /// Appends one of the blocks promised to `table`.
    ///
    /// # Panics
    /// None is left of the promise: the caller reserved too few.
    pub fn append(&mut self, table: &mut BlockTable) -> u32 {
        assert!(table.n_reserved > 0, "a sequence outgrew what was reserved for it");
        let block = self.free.pop().expect("a reserved block is free");
        table.n_reserved -= 1;
        self.n_reserved -= 1;
        self.n_holders[block as usize] = 1;
        table.blocks.push(block);
        block
    }

    /// Gives back all that a sequence holds or was promised. The only way back to free.
    pub fn release(&mut self, table: &mut BlockTable) {
        self.n_reserved -= table.n_reserved;
        table.n_reserved = 0;
        for block in table.blocks.drain(..).rev() {
            let n_holders = &mut self.n_holders[block as usize];
            assert!(*n_holders > 0, "block {block} was released twice");
            *n_holders -= 1;
            if *n_holders == 0 {
                self.free.push(block);
            }
        }
    }

    /// free + used = all, and every holder is known.
    ///
    /// # Panics
    /// It does not hold: a bug.
    pub fn check_integrity<'a>(&mut self, tables: impl Iterator<Item = &'a BlockTable>) {
        let counted = &mut self.counted;
        counted.clear();
        counted.resize(self.n_holders.len(), 0);
        let mut n_reserved = 0;
        for table in tables {
            n_reserved += table.n_reserved;
            for &block in &table.blocks {
                counted[block as usize] += 1;
            }
        }
        assert_eq!(*counted, self.n_holders, "holders of blocks");
        assert_eq!(n_reserved, self.n_reserved, "reserved blocks");
        assert!(self.n_reserved as usize <= self.free.len(), "more is promised than is free");
        let n_used = counted.iter().filter(|&&n| n > 0).count();
        assert_eq!(self.free.len() + n_used, self.n_holders.len(), "free + used = all");
        for &block in &self.free {
            let n = std::mem::replace(&mut counted[block as usize], u32::MAX);
            assert!(n != u32::MAX, "block {block} is free twice");
            assert!(n == 0, "block {block} is free and held");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_is_kept_whatever_others_take() {
        let mut kv = KvBlocks::new(4);
        let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
        assert!(kv.reserve(&mut a, 3));
        assert!(!kv.reserve(&mut b, 2), "only one block is not promised");
        assert!(kv.reserve(&mut b, 1));
        assert_eq!(kv.append(&mut b), 0);
        let taken: Vec<u32> = (0..3).map(|_| kv.append(&mut a)).collect();
        assert_eq!(taken, [1, 2, 3]);
        kv.check_integrity([&a, &b].into_iter());
    }

    #[test]
    fn release_gives_back_blocks_and_promises() {
        let mut kv = KvBlocks::new(8);
        let mut table = BlockTable::default();
        assert!(kv.reserve(&mut table, 5));
        kv.append(&mut table);
        kv.append(&mut table);
        assert_eq!((table.blocks(), table.capacity()), (&[0, 1][..], 2 * KV_BLOCK_LEN));
        assert_eq!(kv.n_available(), 3);
        kv.release(&mut table);
        assert_eq!(kv.n_available(), 8);
        assert_eq!(table, BlockTable::default());
        kv.check_integrity([&table].into_iter());
        kv.release(&mut table);
        kv.check_integrity(std::iter::empty());
    }

    #[test]
    fn freed_blocks_are_reused_first() {
        let mut kv = KvBlocks::new(100);
        let mut table = BlockTable::default();
        for _ in 0..3 {
            assert!(kv.reserve(&mut table, 2));
            assert_eq!((kv.append(&mut table), kv.append(&mut table)), (0, 1));
            kv.release(&mut table);
        }
    }

    #[test]
    #[should_panic(expected = "outgrew")]
    fn taking_more_than_was_promised_is_a_bug() {
        KvBlocks::new(1).append(&mut BlockTable::default());
    }

    #[test]
    fn tokens_round_up_to_blocks() {
        let cases = [(0, 0), (1, 1), (KV_BLOCK_LEN, 1), (KV_BLOCK_LEN + 1, 2)];
        for (n_tokens, n_blocks) in cases {
            assert_eq!(blocks_for(n_tokens), n_blocks, "{n_tokens} tokens");
        }
    }
}
