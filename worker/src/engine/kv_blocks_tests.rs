//! Tables for `kv_blocks.rs`: what is found, shared, kept and given back.

use super::*;
use crate::engine::names::Name;

/// A sequence as far as blocks are concerned.
struct Holder {
    table: BlockTable,
    chain: Chain,
    tokens: Vec<u32>,
}

impl Holder {
    fn new(salt: &str, tokens: &[u32]) -> Self {
        let mut chain = Chain::new(Name::root("model", "", salt));
        chain.extend(tokens);
        Self { table: BlockTable::default(), chain, tokens: tokens.to_vec() }
    }

    fn find(&self, kv: &KvBlocks) -> (usize, usize) {
        let Found { n_blocks, n_cached } = kv.find(&self.chain, &self.tokens, usize::MAX);
        (n_blocks, n_cached)
    }

    fn adopt(&mut self, kv: &mut KvBlocks) -> usize {
        kv.adopt(&mut self.table, &self.chain, &self.tokens, usize::MAX)
    }

    /// Takes what it still needs and fills it; false if there is not enough.
    fn compute(&mut self, kv: &mut KvBlocks) -> bool {
        while self.table.capacity() < self.tokens.len() {
            if !kv.append(&mut self.table) {
                return false;
            }
        }
        kv.name_full(&mut self.table, &self.chain, &self.tokens, self.tokens.len());
        true
    }

    fn release(&mut self, kv: &mut KvBlocks) {
        kv.release(&mut self.table);
    }
}

/// Three full blocks and a part of one.
fn tokens() -> Vec<u32> {
    (0..3 * KV_BLOCK_LEN as u32 + 5).collect()
}

fn check(kv: &mut KvBlocks, holders: &[&Holder]) {
    kv.check_integrity(holders.iter().map(|holder| &holder.table));
}

#[test]
fn full_blocks_are_shared_and_the_partial_tail_is_not() {
    let mut kv = KvBlocks::new(8);
    let (mut a, mut b) = (Holder::new("", &tokens()), Holder::new("", &tokens()));
    assert_eq!(a.find(&kv), (0, 0));
    assert!(a.compute(&mut kv));
    assert_eq!(b.find(&kv), (3, 0), "held blocks cost nothing");
    assert_eq!(b.adopt(&mut kv), 3);
    assert!(b.compute(&mut kv));
    assert_eq!(a.table.blocks()[..3], b.table.blocks()[..3]);
    assert_ne!(a.table.blocks()[3], b.table.blocks()[3]);
    assert_eq!(kv.n_available(), 3);
    check(&mut kv, &[&a, &b]);
    a.release(&mut kv);
    check(&mut kv, &[&a, &b]);
    assert_eq!((kv.n_available(), kv.n_cached()), (4, 0));
    b.release(&mut kv);
    assert_eq!((kv.n_available(), kv.n_cached()), (8, 3));
    assert_eq!(Holder::new("", &tokens()).find(&kv), (3, 3));
    check(&mut kv, &[]);
}

#[test]
fn other_salts_and_other_beginnings_find_nothing() {
    let mut kv = KvBlocks::new(8);
    let mut a = Holder::new("tenant a", &tokens());
    assert!(a.compute(&mut kv));
    assert_eq!(Holder::new("tenant b", &tokens()).find(&kv), (0, 0));
    let mut other = tokens();
    other[20] += 1;
    assert_eq!(Holder::new("tenant a", &other).find(&kv), (1, 0));
    other[0] += 1;
    assert_eq!(Holder::new("tenant a", &other).find(&kv), (0, 0));
}

#[test]
fn a_name_alone_is_not_enough() {
    let mut kv = KvBlocks::new(8);
    let mut a = Holder::new("", &tokens());
    assert!(a.compute(&mut kv));
    // As if another list of tokens had the same names.
    let mut forged = Holder::new("", &tokens());
    forged.tokens[KV_BLOCK_LEN] += 1;
    assert_eq!(forged.find(&kv), (1, 0));
    assert_eq!(forged.adopt(&mut kv), 1);
    check(&mut kv, &[&a, &forged]);
}

#[test]
fn the_least_recently_used_go_first_and_children_before_parents() {
    let mut kv = KvBlocks::new(6);
    let mut long = Holder::new("", &tokens()[..48]);
    assert!(long.compute(&mut kv));
    let long_blocks = long.table.blocks().to_vec();
    let mut other = Holder::new("other", &tokens()[..32]);
    assert!(other.compute(&mut kv));
    let other_blocks = other.table.blocks().to_vec();
    long.release(&mut kv);
    other.release(&mut kv);
    // The beginning of the long one is used again, alone.
    let mut short = Holder::new("", &tokens()[..16]);
    assert_eq!(short.adopt(&mut kv), 1);
    short.release(&mut kv);
    let mut taker = Holder::new("taker", &vec![7; 6 * KV_BLOCK_LEN]);
    let mut went = Vec::new();
    for _ in 0..6 {
        assert!(kv.append(&mut taker.table));
        went.push(*taker.table.blocks().last().unwrap());
        check(&mut kv, &[&taker]);
    }
    assert!(!kv.append(&mut taker.table), "all are held");
    let (long, other) = (long_blocks, other_blocks);
    assert_eq!(went, [5, long[2], long[1], other[1], other[0], long[0]]);
}

#[test]
fn what_two_computed_is_named_once() {
    let mut kv = KvBlocks::new(8);
    let (mut a, mut b) = (Holder::new("", &tokens()), Holder::new("", &tokens()));
    assert!(a.compute(&mut kv) && b.compute(&mut kv));
    assert!(a.table.is_on_path() && !b.table.is_on_path());
    check(&mut kv, &[&a, &b]);
    b.release(&mut kv);
    assert_eq!((kv.n_available(), kv.n_cached()), (4, 0), "unnamed blocks are free at once");
    assert!(b.table.is_on_path(), "it may begin anew");
    check(&mut kv, &[&a, &b]);
}

#[test]
fn freed_blocks_are_reused_before_eviction() {
    let mut kv = KvBlocks::new(8);
    let mut cached = Holder::new("", &tokens()[..32]);
    assert!(cached.compute(&mut kv));
    cached.release(&mut kv);
    for n in 0..6u32 {
        let mut short = Holder::new("", &[n]);
        assert!(short.compute(&mut kv));
        short.release(&mut kv);
    }
    assert_eq!(cached.find(&kv), (2, 2));
}

#[test]
#[should_panic(expected = "held = all")]
fn a_lost_block_is_found_out() {
    let mut kv = KvBlocks::new(4);
    kv.free.pop();
    check(&mut kv, &[]);
}

#[test]
#[should_panic(expected = "holders")]
fn a_forgotten_table_is_found_out() {
    let mut kv = KvBlocks::new(4);
    assert!(Holder::new("", &tokens()).compute(&mut kv));
    check(&mut kv, &[]);
}

#[test]
fn tokens_round_up_to_blocks() {
    let cases = [(0, 0), (1, 1), (KV_BLOCK_LEN, 1), (KV_BLOCK_LEN + 1, 2)];
    for (n_tokens, n_blocks) in cases {
        assert_eq!(blocks_for(n_tokens), n_blocks, "{n_tokens} tokens");
    }
}
