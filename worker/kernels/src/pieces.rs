//! Who multiplies which tiles of a group of matrices, and in what order.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::pool::part;

/// Bytes of weights that a thread takes at a time; of a small matrix less, so that a slow core
/// leaves something to the others.
const PIECE_BYTES: usize = 128 << 10;
const MIN_PIECES: usize = 8;

/// Threads that have tiles of their own; more of them share.
const MAX_OWNERS: usize = 64;

/// The work of a step: chunks of rows, each over all tiles, some tiles at a time.
///
/// A thread owns its part of each matrix, so that what it computed is near where it goes on with it,
/// and goes through it in order, so that what it fetches ahead is what it reads next. When it has
/// done its own it helps others, from their end.
pub(crate) struct Pieces<'a> {
    /// Of each matrix.
    n_tiles: &'a [usize],
    rows: usize,
    chunk_rows: usize,
    n_owners: usize,
    per_owner: usize,
    /// Of each owner: its first piece that nobody took, and the end of those.
    left: [Line; MAX_OWNERS],
}

/// On a cache line of its own: two numbers of 32 bits, the first one low.
#[repr(align(64))]
struct Line(AtomicU64);

/// Some of an owner's tiles, for some rows.
pub(crate) struct Piece {
    owner: usize,
    /// Of the owner's tiles of all matrices, one matrix after the other.
    tiles: Range<usize>,
    pub(crate) rows: Range<usize>,
}

impl<'a> Pieces<'a> {
    /// Of matrices of so many tiles and so many bytes together; pieces have `least_tiles`, where a
    /// thread has as many.
    pub(crate) fn new(
        n_tiles: &'a [usize],
        bytes: usize,
        least_tiles: usize,
        rows: usize,
        chunk_rows: usize,
        n_threads: usize,
    ) -> Self {
        let n_owners = n_threads.min(MAX_OWNERS);
        let own_tiles: usize = n_tiles.iter().map(|n| n.div_ceil(n_owners)).sum();
        let per_owner = match n_threads {
            1 => 1,
            _ => (bytes / (n_threads * PIECE_BYTES))
                .max(MIN_PIECES)
                .min(own_tiles / least_tiles)
                .max(1),
        };
        let n_pieces = rows.div_ceil(chunk_rows) * per_owner;
        let left = [const { Line(AtomicU64::new(0)) }; MAX_OWNERS];
        for owner in &left[..n_owners] {
            owner.0.store((n_pieces as u64) << 32, Ordering::Relaxed);
        }
        Self { n_tiles, rows, chunk_rows, n_owners, per_owner, left }
    }

    /// A piece that nobody else gets.
    pub(crate) fn take(&self, thread: usize) -> Option<Piece> {
        (0..self.n_owners).find_map(|i| {
            let owner = (thread + i) % self.n_owners;
            let is_own = i == 0;
            let rest = |left| {
                let (first, end) = halves(left);
                let (from, to) = if is_own { (first + 1, end) } else { (first, end.max(1) - 1) };
                (first < end).then_some(from | to << 32)
            };
            let left = self.left[owner].0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest);
            let (first, end) = halves(left.ok()?);
            Some(self.piece(owner, if is_own { first } else { end - 1 } as usize))
        })
    }

    /// An owner's pieces go chunk by chunk.
    fn piece(&self, owner: usize, i: usize) -> Piece {
        let (chunk, i) = (i / self.per_owner, i % self.per_owner);
        let first = chunk * self.chunk_rows;
        let rows = first..(first + self.chunk_rows).min(self.rows);
        let own_tiles = (0..self.n_tiles.len()).map(|matrix| self.own(owner, matrix).len()).sum();
        Piece { owner, tiles: part(own_tiles, i, self.per_owner), rows }
    }

    /// An owner's tiles of a matrix.
    fn own(&self, owner: usize, matrix: usize) -> Range<usize> {
        part(self.n_tiles[matrix], owner, self.n_owners)
    }

    /// A piece's tiles of a matrix.
    pub(crate) fn tiles(&self, piece: &Piece, matrix: usize) -> Range<usize> {
        let before: usize = (0..matrix).map(|other| self.own(piece.owner, other).len()).sum();
        let own = self.own(piece.owner, matrix);
        let at = |tile: usize| own.start + tile.clamp(before, before + own.len()) - before;
        at(piece.tiles.start)..at(piece.tiles.end)
    }
}

/// The low and the high half.
fn halves(of: u64) -> (u64, u64) {
    (of & u64::from(u32::MAX), of >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_of_every_row_is_taken_once_whoever_takes_it() {
        for n_tiles in [&[1][..], &[128], &[5, 1, 1], &[40, 7, 0, 300]] {
            for (rows, chunk_rows, least) in [(1, 64, 1), (130, 64, 1), (130, 64, 8)] {
                for n_threads in [1, 2, 3, 7, 100] {
                    let pieces = Pieces::new(n_tiles, 50 << 20, least, rows, chunk_rows, n_threads);
                    let mut taken: Vec<_> = n_tiles.iter().map(|n| vec![0; n * rows]).collect();
                    // Thread 0 is slow: it takes one piece where others take three.
                    let turns = (0..).flat_map(|turn| [0, 1, 1 + turn, 2 + 3 * turn]);
                    for thread in turns.map(|thread| thread % n_threads) {
                        let Some(piece) = pieces.take(thread) else { break };
                        for (matrix, taken) in taken.iter_mut().enumerate() {
                            for tile in pieces.tiles(&piece, matrix) {
                                piece.rows.clone().for_each(|row| taken[tile * rows + row] += 1);
                            }
                        }
                    }
                    assert!(taken.iter().flatten().all(|&n| n == 1), "{n_tiles:?} {n_threads}");
                }
            }
        }
    }
}
