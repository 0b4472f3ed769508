//! Which KV blocks are free, held or cached, and by what name they are found again. Pure
//! accounting: the memory is the backend's. Only the lead rank keeps it; followers learn block ids
//! from step plans.
//!
//! A block belongs to the sequences that hold it. Once it is full it gets a name (`names`), and
//! others whose tokens begin alike hold it too instead of computing them again; nobody writes to a
//! named block. One that nobody holds any more stays cached until its place is needed: the least
//! recently used goes first, children before parents. That order costs nothing to keep: whoever
//! holds a block holds all before it, and a sequence gives its blocks back last first, so in the
//! list of cached blocks a child always stands before its parent.
//!
//! A sequence that computes what another has named meanwhile keeps its own block, unnamed, and all
//! that follow it. That is rare (`scheduler` lets it wait and adopt instead), and so the named
//! blocks of every table are one path of the tree of names.

use std::collections::HashMap;

use super::lru::Lru;
use super::names::{Chain, Name};
use crate::backend::KV_BLOCK_LEN;

/// The blocks of one sequence, in order of position.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<u32>,
    /// The first so many are named.
    n_named: usize,
    /// A block of it holds what another block is named for; it and all after it stay unnamed.
    is_apart: bool,
}

impl BlockTable {
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Tokens that the blocks can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.blocks.len() * KV_BLOCK_LEN
    }

    /// What it fills next will be named.
    #[must_use]
    pub fn is_on_path(&self) -> bool {
        !self.is_apart
    }

    /// Makes room for the blocks of `n_tokens` tokens.
    pub fn reserve(&mut self, n_tokens: usize) {
        self.blocks.reserve_exact(blocks_for(n_tokens).saturating_sub(self.blocks.len()));
    }
}

/// All KV blocks of a group.
#[derive(Debug)]
pub struct KvBlocks {
    /// By block: sequences that hold it.
    n_holders: Vec<u32>,
    /// Neither held nor named; last freed on top.
    free: Vec<u32>,
    /// By block: what it is named for.
    contents: Vec<Option<Content>>,
    by_name: HashMap<Name, u32>,
    /// Named and held by nobody.
    cached: Lru,
    /// Of `check_integrity`, by block: tables that hold it. Kept, so that checking allocates once.
    counted: Vec<u32>,
}

#[derive(Debug)]
struct Content {
    name: Name,
    before: Name,
    /// It begins a chain.
    is_first: bool,
    tokens: [u32; KV_BLOCK_LEN],
}

/// Blocks of a prompt that need not be computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    pub n_blocks: usize,
    /// Those of them that nobody holds: taking them makes as many fewer available.
    pub n_cached: usize,
}

/// Blocks that `n_tokens` tokens need.
#[must_use]
pub fn blocks_for(n_tokens: usize) -> usize {
    n_tokens.div_ceil(KV_BLOCK_LEN)
}

impl KvBlocks {
    #[must_use]
    pub fn new(n_blocks: u32) -> Self {
        let n = n_blocks as usize;
        Self {
            n_holders: vec![0; n],
            free: (0..n_blocks).rev().collect(),
            contents: (0..n).map(|_| None).collect(),
            // Twice as much as can be in it: then the map tidies itself up in place.
            by_name: HashMap::with_capacity(2 * n),
            cached: Lru::new(n),
            counted: Vec::new(),
        }
    }

    #[must_use]
    pub fn n_total(&self) -> u32 {
        self.n_holders.len() as u32
    }

    /// Blocks that nobody holds, cached ones included.
    #[must_use]
    pub fn n_available(&self) -> u32 {
        self.free.len() as u32 + self.cached.len()
    }

    #[must_use]
    pub fn n_cached(&self) -> u32 {
        self.cached.len()
    }

    /// How much of `tokens` a new table could adopt, of its first `max_blocks` blocks.
    #[must_use]
    pub fn find(&self, chain: &Chain, tokens: &[u32], max_blocks: usize) -> Found {
        let mut found = Found::default();
        while let Some(block) = self.named(chain, tokens, found.n_blocks)
            && found.n_blocks < max_blocks
        {
            found.n_blocks += 1;
            found.n_cached += usize::from(self.n_holders[block as usize] == 0);
        }
        found
    }

    /// Lets `table` hold the named blocks that continue it, up to `max_blocks` in all. Returns how
    /// many those were.
    pub fn adopt(
        &mut self,
        table: &mut BlockTable,
        chain: &Chain,
        tokens: &[u32],
        max_blocks: usize,
    ) -> usize {
        let n_before = table.blocks.len();
        if table.is_apart || table.n_named < n_before {
            return 0;
        }
        while table.blocks.len() < max_blocks
            && let Some(block) = self.named(chain, tokens, table.blocks.len())
        {
            let n_holders = &mut self.n_holders[block as usize];
            if *n_holders == 0 {
                self.cached.remove(block);
            }
            *n_holders += 1;
            table.blocks.push(block);
        }
        table.n_named = table.blocks.len();
        table.blocks.len() - n_before
    }

    /// The block that holds the `block_idx`-th of `tokens`.
    fn named(&self, chain: &Chain, tokens: &[u32], block_idx: usize) -> Option<u32> {
        let block = *self.by_name.get(&chain.get(block_idx)?)?;
        let content = self.contents[block as usize].as_ref().expect("a named block has content");
        let is_it = content.before == chain.before(block_idx)
            && content.tokens == tokens[block_idx * KV_BLOCK_LEN..][..KV_BLOCK_LEN];
        is_it.then_some(block)
    }

    /// Gives `table` one more block to write to, for which a cached one may have to go; false if
    /// all are held.
    #[must_use]
    pub fn append(&mut self, table: &mut BlockTable) -> bool {
        let Some(block) = self.free.pop().or_else(|| self.evict()) else {
            return false;
        };
        self.n_holders[block as usize] = 1;
        table.blocks.push(block);
        true
    }

    fn evict(&mut self) -> Option<u32> {
        let block = self.cached.pop_first()?;
        let content = self.contents[block as usize].take().expect("a cached block has content");
        self.by_name.remove(&content.name);
        Some(block)
    }

    /// Names the blocks of `table` that its first `n_computed` tokens fill.
    pub fn name_full(
        &mut self,
        table: &mut BlockTable,
        chain: &Chain,
        tokens: &[u32],
        n_computed: usize,
    ) {
        while !table.is_apart && table.n_named < n_computed / KV_BLOCK_LEN {
            let block_idx = table.n_named;
            let name = chain.get(block_idx).expect("tokens that are computed are known");
            if self.by_name.contains_key(&name) {
                table.is_apart = true;
                return;
            }
            let block = table.blocks[block_idx];
            let tokens = &tokens[block_idx * KV_BLOCK_LEN..];
            self.contents[block as usize] = Some(Content {
                name,
                before: chain.before(block_idx),
                is_first: block_idx == 0,
                tokens: *tokens.first_chunk().expect("a full block has its tokens"),
            });
            self.by_name.insert(name, block);
            table.n_named += 1;
        }
    }

    /// Gives back all that a sequence holds: named blocks stay cached, the others are free. The
    /// only way out of being held.
    pub fn release(&mut self, table: &mut BlockTable) {
        for block in table.blocks.drain(..).rev() {
            let n_holders = &mut self.n_holders[block as usize];
            assert!(*n_holders > 0, "block {block} was released twice");
            *n_holders -= 1;
            if *n_holders > 0 {
                continue;
            }
            match self.contents[block as usize] {
                Some(_) => self.cached.push_last(block),
                None => self.free.push(block),
            }
        }
        table.n_named = 0;
        table.is_apart = false;
    }

    /// free + cached + held = all; every holder is known; names, contents and the order of
    /// eviction agree.
    ///
    /// # Panics
    /// It does not hold: a bug.
    pub fn check_integrity<'a>(&mut self, tables: impl Iterator<Item = &'a BlockTable>) {
        let counted = &mut self.counted;
        counted.clear();
        counted.resize(self.n_holders.len(), 0);
        for table in tables {
            for (block_idx, &block) in table.blocks.iter().enumerate() {
                counted[block as usize] += 1;
                let is_named = self.contents[block as usize].is_some();
                assert_eq!(is_named, block_idx < table.n_named, "block {block} has a name");
            }
        }
        assert_eq!(*counted, self.n_holders, "holders of blocks");
        let n_held = counted.iter().filter(|&&n| n > 0).count();
        let n_unheld = self.free.len() + self.cached.len() as usize;
        assert_eq!(n_unheld + n_held, counted.len(), "free + cached + held = all");
        for &block in &self.free {
            let n = std::mem::replace(&mut counted[block as usize], u32::MAX);
            assert!(n == 0, "block {block} is free twice, or free and held");
            assert!(self.contents[block as usize].is_none(), "block {block} is free and named");
        }
        let mut n_cached = 0;
        for block in self.cached.iter() {
            n_cached += 1;
            let content = self.contents[block as usize].as_ref().expect("cached blocks are named");
            if !content.is_first {
                let parent = self.by_name[&content.before];
                let comes_later = counted[parent as usize] != u32::MAX;
                assert!(comes_later, "block {block} would go after its parent {parent}");
            }
            let n = std::mem::replace(&mut counted[block as usize], u32::MAX);
            assert!(n == 0, "block {block} is cached twice, or cached and held");
        }
        assert_eq!(n_cached, self.cached.len(), "cached blocks");
        self.check_names();
    }

    fn check_names(&self) {
        let mut n_named = 0;
        for (block, content) in self.contents.iter().enumerate() {
            let Some(content) = content else { continue };
            n_named += 1;
            assert_eq!(self.by_name[&content.name], block as u32, "a name finds its block");
            if content.is_first {
                continue;
            }
            let parent = self.by_name[&content.before] as usize;
            assert!(self.n_holders[block] <= self.n_holders[parent], "who holds it holds all");
        }
        assert_eq!(n_named, self.by_name.len(), "every name has a block");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "kv_blocks_tests.rs"]
mod tests;
