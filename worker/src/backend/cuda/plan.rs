//! What a step's kernels are told (pure): the batch as words for device memory, who attends by which
//! kernel, and the bucket whose graph the step may run by.

use std::cmp::Reverse;

use evener_kernels::cuda::attention::{Item, NO_SLOT, Tile, WORDS};

use crate::backend::{Batch, KV_BLOCK_LEN, Span};

/// Spans of so many rows are attended by tiles, where the cache allows it: below, a tile of a tensor
/// core would be mostly empty.
const LEAST_TILED_ROWS: u32 = 16;
/// The largest bucket of tokens: beyond, launching costs next to nothing beside computing.
const LARGEST_BUCKET: usize = 256;

/// What bounds every step of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) max_tokens: usize,
    pub(super) max_samples: usize,
    pub(super) max_items: usize,
    /// Items that are enough to keep the device busy: more only cost their sums.
    pub(super) enough_items: usize,
    pub(super) n_kv_blocks: usize,
    /// The most query heads that one KV head serves; 0 without attention.
    pub(super) group: usize,
    /// Positions of a split.
    pub(super) split: u32,
    /// Whether `attend_tiles` can read the cache.
    pub(super) has_tiles: bool,
    /// Query vectors of a tile.
    pub(super) tile_vectors: usize,
}

/// All sizes of a step's launches: steps of one size can share a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Sizes {
    pub(super) n_tokens: usize,
    pub(super) n_samples: usize,
    pub(super) n_items: usize,
    pub(super) n_tiles: usize,
}

/// Where each kind of word begins. All of a step's words are one upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) items: usize,
    pub(super) tiles: usize,
    pub(super) tokens: usize,
    pub(super) positions: usize,
    pub(super) slots: usize,
    pub(super) first_blocks: usize,
    pub(super) first_items: usize,
    pub(super) samples: usize,
    /// The last: as long as the step's tables.
    pub(super) tables: usize,
}

impl Layout {
    pub(super) fn of(sizes: Sizes) -> Self {
        let Sizes { n_tokens, n_samples, n_items, n_tiles } = sizes;
        let items = 0; // first, for they are aligned to four words
        let tiles = items + WORDS * n_items;
        let tokens = tiles + WORDS * n_tiles;
        let positions = tokens + n_tokens;
        let slots = positions + n_tokens;
        let first_blocks = slots + n_tokens;
        let first_items = first_blocks + n_tokens;
        let samples = first_items + n_tokens + 1;
        let tables = samples + n_samples;
        Self { items, tiles, tokens, positions, slots, first_blocks, first_items, samples, tables }
    }
}

/// A step for the device. Its memory is kept from step to step.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) words: Vec<u32>,
    items: Vec<Item>,
    tiles: Vec<Tile>,
    /// By row, and one more: where its items begin.
    first_items: Vec<u32>,
    /// Of each row that has items: the row, its splits, and where its tables begin.
    splits: Vec<(u32, u32, u32)>,
}

/// The bucket of a number: exact up to 8, then in steps that waste at most a third.
pub(super) fn bucket(n: usize) -> usize {
    match n {
        0..=8 => n,
        9..=64 => n.next_multiple_of(8),
        65..=128 => n.next_multiple_of(32),
        _ => n.next_multiple_of(64),
    }
}

impl Plan {
    /// The most words of any step within bounds, with tables of so many blocks.
    pub(super) fn max_words(bounds: &Bounds, max_table_blocks: usize) -> usize {
        let sizes = Sizes {
            n_tokens: bounds.max_tokens,
            n_samples: bounds.max_samples,
            n_items: bounds.max_items,
            n_tiles: bounds.max_tokens * bounds.group.max(1),
        };
        Layout::of(sizes).tables + max_table_blocks
    }

    /// Replaces the plan. `pads`: whether the step may be padded to its bucket, so that a graph of
    /// another step of this size does for it.
    ///
    /// # Panics
    /// If the batch breaks the bounds: whoever made it must not.
    pub(super) fn make(&mut self, batch: &Batch, bounds: &Bounds, pads: bool) -> (Sizes, Layout) {
        let (n_tokens, n_samples) = (batch.tokens.len(), batch.sample_rows.len());
        assert!(n_tokens <= bounds.max_tokens, "the engine keeps to its token budget");
        assert!(n_samples <= bounds.max_samples, "and to its sample rows");
        let n_slots = (bounds.n_kv_blocks * KV_BLOCK_LEN) as u32;
        assert!(batch.slots.iter().all(|&slot| slot < n_slots), "slots are in the cache");
        let is_there = |&block: &u32| (block as usize) < bounds.n_kv_blocks;
        assert!(batch.block_tables.iter().all(is_there), "blocks are in the cache");
        let is_row = |&row: &u32| (row as usize) < n_tokens;
        assert!(batch.sample_rows.iter().all(is_row), "sampled rows are the step's");
        self.divide(batch, bounds);
        let mut sizes =
            Sizes { n_tokens, n_samples, n_items: self.items.len(), n_tiles: self.tiles.len() };
        if pads {
            sizes = padded(sizes, bounds);
        }
        let layout = Layout::of(sizes);
        self.write(batch, sizes, layout);
        (sizes, layout)
    }

    /// Whether a step of these sizes is worth a graph.
    pub(super) fn is_bucketed(batch: &Batch, bounds: &Bounds) -> bool {
        let is_tiled = |span: &Span| tiled(span, bounds);
        batch.tokens.len() <= LARGEST_BUCKET && !batch.spans.iter().any(is_tiled)
    }

    /// Gives every row of every span its items or tiles.
    fn divide(&mut self, batch: &Batch, bounds: &Bounds) {
        let Self { items, tiles, first_items, splits, .. } = self;
        items.clear();
        tiles.clear();
        first_items.clear();
        splits.clear();
        if bounds.group == 0 {
            first_items.resize(batch.tokens.len() + 1, 0);
            return;
        }
        for span in &batch.spans {
            let rows = span.first_row..span.first_row + span.n_rows;
            let last = batch.positions[rows.end as usize - 1];
            assert!(last as usize / KV_BLOCK_LEN < span.n_blocks as usize, "blocks for positions");
            if tiled(span, bounds) {
                let n_vectors = span.n_rows as usize * bounds.group;
                tiles.extend((0..n_vectors).step_by(bounds.tile_vectors).map(|first_vector| {
                    Tile {
                        first_row: span.first_row,
                        n_rows: span.n_rows,
                        first_vector: first_vector as u32,
                    }
                }));
            } else {
                splits.extend(rows.map(|row| {
                    let n = (batch.positions[row as usize] + 1).div_ceil(bounds.split);
                    assert!(n < 1 << 16, "splits are counted by 16 bits");
                    (row, n, span.first_block)
                }));
            }
        }
        // Longest contexts first: what runs last is short, and leaves few of the card waiting.
        tiles.sort_unstable_by_key(|tile| {
            let row = tile.first_row + tile.first_vector / bounds.group as u32;
            (Reverse(batch.positions[row as usize]), tile.first_row, tile.first_vector)
        });
        assert!(splits.len() <= bounds.max_items, "an item for each row at least");
        // Some items, for they run side by side; at least one for each row.
        let most = bounds.enough_items.max(splits.len()).min(bounds.max_items);
        let count = |of_item: u32| {
            splits.iter().map(|(_, n, _)| n.div_ceil(of_item) as usize).sum::<usize>()
        };
        let mut of_item = count(1).div_ceil(most.max(1)).max(1) as u32;
        while count(of_item) > most {
            of_item += 1;
        }
        let mut splits = splits.iter().peekable();
        for row in 0..batch.tokens.len() as u32 {
            first_items.push(items.len() as u32);
            let next = splits.next_if(|&&(of, ..)| of == row);
            let Some(&(_, n, first_block)) = next else { continue };
            items.extend((0..n).step_by(of_item as usize).map(|first_split| Item {
                row,
                first_split,
                n_splits: of_item.min(n - first_split),
                position: batch.positions[row as usize],
                first_block,
            }));
        }
        first_items.push(items.len() as u32);
    }

    fn write(&mut self, batch: &Batch, sizes: Sizes, layout: Layout) {
        let Self { words, items, tiles, first_items, .. } = self;
        words.clear();
        words.resize(layout.tables, 0);
        let mut put = |at: usize, n: usize, values: &mut dyn Iterator<Item = u32>, rest: u32| {
            let to = &mut words[at..at + n];
            to.fill(rest);
            to.iter_mut().zip(values).for_each(|(to, value)| *to = value);
        };
        let Sizes { n_tokens, n_samples, n_items, n_tiles } = sizes;
        put(layout.items, WORDS * n_items, &mut items.iter().flat_map(|item| item.words()), 0);
        put(layout.tiles, WORDS * n_tiles, &mut tiles.iter().flat_map(|tile| tile.words()), 0);
        // Rows that pad are of token 0 at position 0, are written nowhere, and attend to nothing.
        put(layout.tokens, n_tokens, &mut batch.tokens.iter().copied(), 0);
        put(layout.positions, n_tokens, &mut batch.positions.iter().copied(), 0);
        put(layout.slots, n_tokens, &mut batch.slots.iter().copied(), NO_SLOT);
        let first_blocks = batch.spans.iter().flat_map(|s| (0..s.n_rows).map(|_| s.first_block));
        put(layout.first_blocks, n_tokens, &mut { first_blocks }, 0);
        let end = first_items.last().copied().unwrap_or(0);
        put(layout.first_items, n_tokens + 1, &mut first_items.iter().copied(), end);
        put(layout.samples, n_samples, &mut batch.sample_rows.iter().copied(), 0);
        words.extend_from_slice(&batch.block_tables);
    }
}

fn tiled(span: &Span, bounds: &Bounds) -> bool {
    bounds.has_tiles && span.n_rows >= LEAST_TILED_ROWS
}

/// To the step's bucket.
fn padded(sizes: Sizes, bounds: &Bounds) -> Sizes {
    let Sizes { n_tokens, n_samples, n_items, n_tiles } = sizes;
    Sizes {
        n_tokens: bucket(n_tokens).min(bounds.max_tokens),
        n_samples: bucket(n_samples).min(bounds.max_samples),
        n_items: n_items.next_power_of_two().min(bounds.max_items),
        n_tiles,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        max_tokens: 64,
        max_samples: 16,
        max_items: 40,
        enough_items: 40,
        n_kv_blocks: 1000,
        group: 3,
        split: 256,
        has_tiles: true,
        tile_vectors: 64,
    };

    /// Spans of (first position, rows), each with blocks of its own; each row's last is sampled.
    fn batch(spans: &[(u32, u32)]) -> Batch {
        let mut batch = Batch { step: 1, ..Batch::default() };
        for &(start, n_rows) in spans {
            let first_row = batch.tokens.len() as u32;
            let first_block = batch.block_tables.len() as u32;
            let n_blocks = (start + n_rows).div_ceil(KV_BLOCK_LEN as u32);
            batch.block_tables.extend((0..n_blocks).map(|i| first_block + i));
            batch.spans.push(Span { first_row, n_rows, first_block, n_blocks });
            for position in start..start + n_rows {
                batch.tokens.push(position + 7);
                batch.positions.push(position);
                let block = first_block + position / KV_BLOCK_LEN as u32;
                batch.slots.push(block * KV_BLOCK_LEN as u32 + position % KV_BLOCK_LEN as u32);
            }
            batch.sample_rows.push(first_row + n_rows - 1);
        }
        batch
    }

    #[test]
    fn buckets_hold_their_numbers_and_waste_little() {
        for n in 0..=2000 {
            let got = bucket(n);
            assert!(got >= n && bucket(got) == got, "{n}: {got}");
            assert!(n <= 8 && got == n || 3 * (got - n) <= got + 8, "{n}: {got}");
        }
        let mut buckets: Vec<usize> = (1..=LARGEST_BUCKET).map(bucket).collect();
        buckets.dedup();
        assert_eq!(buckets.len(), 8 + 7 + 2 + 2, "few enough for a graph each");
    }

    #[test]
    fn every_position_of_every_row_is_attended_once() {
        // (spans, most items) to (items, tiles)
        for (spans, max_items, n_items, n_tiles) in [
            (&[(0, 1)][..], 40, 1, 0),
            (&[(255, 1), (256, 1)], 40, 3, 0),
            (&[(999, 2), (5, 1)], 40, 9, 0),
            (&[(999, 2), (5, 1)], 5, 5, 0),
            (&[(999, 2), (5, 1)], 3, 3, 0),
            (&[(40, 16), (300, 1)], 40, 2, 1),
            (&[(0, 22), (300, 15)], 40, 30, 2),
        ] {
            let batch = batch(spans);
            let bounds = Bounds { max_items, ..BOUNDS };
            let mut plan = Plan::default();
            let (sizes, layout) = plan.make(&batch, &bounds, false);
            assert_eq!((sizes.n_items, sizes.n_tiles), (n_items, n_tiles), "{spans:?}");
            let tiled: Vec<u32> = plan.tiles.iter().map(|tile| tile.first_row).collect();
            for row in 0..batch.tokens.len() {
                let [first, end] =
                    [0, 1].map(|i| plan.words[layout.first_items + row + i] as usize);
                let mut next = 0;
                for item in &plan.items[first..end] {
                    assert_eq!((item.row as usize, item.first_split), (row, next));
                    next += item.n_splits;
                }
                let span = batch
                    .spans
                    .iter()
                    .find(|s| (s.first_row..s.first_row + s.n_rows).contains(&(row as u32)));
                let is_tiled = tiled.contains(&span.map_or(0, |s| s.first_row));
                let due = (batch.positions[row] + 1).div_ceil(bounds.split);
                assert_eq!(next, if is_tiled { 0 } else { due }, "{spans:?} row {row}");
            }
            for span in batch.spans.iter().filter(|s| s.n_rows >= LEAST_TILED_ROWS) {
                let mut firsts: Vec<u32> = plan
                    .tiles
                    .iter()
                    .filter(|tile| tile.first_row == span.first_row)
                    .map(|tile| tile.first_vector)
                    .collect();
                firsts.sort_unstable();
                let n = (span.n_rows as usize * BOUNDS.group).div_ceil(BOUNDS.tile_vectors);
                let want: Vec<u32> = (0..n).map(|i| (i * BOUNDS.tile_vectors) as u32).collect();
                assert_eq!(firsts, want);
            }
        }
    }

    #[test]
    fn tiles_of_the_longest_contexts_come_first() {
        let bounds = Bounds { max_tokens: 200, group: 4, ..BOUNDS };
        let mut plan = Plan::default();
        plan.make(&batch(&[(0, 40), (90, 20), (8, 33)]), &bounds, false);
        let got: Vec<(u32, u32)> =
            plan.tiles.iter().map(|tile| (tile.first_row, tile.first_vector)).collect();
        // They begin at positions 106, 90; 40, 32; 24, 16; 8, 0 of their sequences.
        let want = [(40, 64), (40, 0), (60, 128), (0, 128), (60, 64), (0, 64), (60, 0), (0, 0)];
        assert_eq!(got, want);
    }

    #[test]
    fn steps_of_one_bucket_differ_in_words_only() {
        let (mut one, mut other) = (Plan::default(), Plan::default());
        let of_one = one.make(&batch(&[(3, 1); 9]), &BOUNDS, true);
        let of_other = other.make(&batch(&[(7, 1); 16]), &BOUNDS, true);
        assert_eq!(of_one, of_other);
        let (sizes, layout) = of_one;
        assert_eq!((sizes.n_tokens, sizes.n_samples, sizes.n_items), (16, 16, 16));
        // The rows beyond the nine write nowhere, have no items, and pad with items of no splits.
        assert!(one.words[layout.slots + 9..layout.first_blocks].iter().all(|&s| s == NO_SLOT));
        assert!(one.words[layout.first_items + 9..layout.samples].iter().all(|&item| item == 9));
        for item in 9..16 {
            assert_eq!(one.words[layout.items + WORDS * item..][..WORDS], [0; WORDS]);
        }
        assert_eq!(one.words[layout.tables..], batch(&[(3, 1); 9]).block_tables);
    }

    #[test]
    fn padding_stays_within_what_was_allocated() {
        for n in 1..=BOUNDS.max_samples {
            let mut plan = Plan::default();
            let bounds = Bounds { max_samples: n.max(13), ..BOUNDS };
            let (sizes, layout) = plan.make(&batch(&vec![(600, 1); n]), &bounds, true);
            assert!(sizes.n_samples <= bounds.max_samples && sizes.n_items <= bounds.max_items);
            let tables = plan.words.len() - layout.tables;
            assert!(plan.words.len() <= Plan::max_words(&bounds, tables));
        }
    }

    #[test]
    fn prefill_and_large_steps_run_without_a_graph() {
        let check = |spans: &[(u32, u32)], expect: bool| {
            let bounds = Bounds { max_tokens: 1000, ..BOUNDS };
            assert_eq!(Plan::is_bucketed(&batch(spans), &bounds), expect, "{spans:?}");
        };
        check(&[(9, 1), (40, 5)], true);
        check(&[(9, 1), (40, 16)], false);
        check(&[(9, 1); 257], false);
    }

    #[test]
    fn a_rank_without_attention_has_no_items() {
        let mut plan = Plan::default();
        let bounds = Bounds { group: 0, ..BOUNDS };
        let (sizes, layout) = plan.make(&batch(&[(0, 20), (5, 1)]), &bounds, false);
        assert_eq!((sizes.n_items, sizes.n_tiles), (0, 0));
        assert!(plan.words[layout.first_items..layout.samples].iter().all(|&item| item == 0));
    }

    #[test]
    #[should_panic(expected = "slots are in the cache")]
    fn a_slot_beyond_the_cache_is_a_bug() {
        let mut broken = batch(&[(0, 1)]);
        broken.slots[0] = (BOUNDS.n_kv_blocks * KV_BLOCK_LEN) as u32;
        Plan::default().make(&broken, &BOUNDS, false);
    }
}
