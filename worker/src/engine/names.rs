//! Names of full KV blocks: what is computed there, said in 128 bits. Pure.
//!
//! A block's name hashes the name before it and its own tokens, so it stands for all tokens up to
//! its end; the chain begins with the model, the adapter and the salt of whoever may share it.
//! SHA-256, because users choose the tokens: nobody can choose two lists of one name. `kv_blocks`
//! compares the tokens all the same.

use sha2::{Digest, Sha256};

use crate::backend::KV_BLOCK_LEN;

/// Of a full block, or of where a chain begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Name(u128);

/// The names of a sequence's full blocks.
#[derive(Debug)]
pub struct Chain {
    root: Name,
    /// By block, as far as its tokens are known.
    names: Vec<Name>,
}

impl Name {
    /// Where chains begin: equal only if model, adapter (empty: none) and salt are.
    #[must_use]
    pub fn root(model: &str, adapter: &str, salt: &str) -> Self {
        let mut hash = Sha256::new();
        for part in [model, adapter, salt] {
            // Lengths, so that no two triples run together into the same bytes.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self::of(hash)
    }

    fn of_block(before: Self, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update(before.0.to_le_bytes());
        tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        Self::of(hash)
    }

    fn of(hash: Sha256) -> Self {
        let digest = hash.finalize();
        let first = digest.first_chunk::<16>().expect("SHA-256 gives 32 bytes");
        Self(u128::from_le_bytes(*first))
    }
}

impl Chain {
    #[must_use]
    pub fn new(root: Name) -> Self {
        Self { root, names: Vec::new() }
    }

    /// Makes room for the names of `n_tokens` tokens.
    pub fn reserve(&mut self, n_tokens: usize) {
        self.names.reserve_exact((n_tokens / KV_BLOCK_LEN).saturating_sub(self.names.len()));
    }

    /// Names every block that `tokens`, from the first on, fill.
    pub fn extend(&mut self, tokens: &[u32]) {
        let blocks = tokens.chunks_exact(KV_BLOCK_LEN).skip(self.names.len());
        for block in blocks {
            let before = self.before(self.names.len());
            self.names.push(Name::of_block(before, block));
        }
    }

    /// The name of a block; none if its tokens are not all known.
    #[must_use]
    pub fn get(&self, block_idx: usize) -> Option<Name> {
        self.names.get(block_idx).copied()
    }

    /// What comes before a block that has a name, or could be the next to get one.
    ///
    /// # Panics
    /// The block before it has no name.
    #[must_use]
    pub fn before(&self, block_idx: usize) -> Name {
        block_idx.checked_sub(1).map_or(self.root, |before| self.names[before])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(root: Name, tokens: &[u32]) -> Chain {
        let mut chain = Chain::new(root);
        chain.extend(tokens);
        chain
    }

    #[test]
    fn a_name_stands_for_everything_before_it() {
        let tokens: Vec<u32> = (0..48).collect();
        let root = Name::root("model", "", "salt");
        let whole = chain(root, &tokens);
        assert_eq!(whole.names.len(), 3);
        for changed in 0..48 {
            let mut tokens = tokens.clone();
            tokens[changed] += 1;
            let other = chain(root, &tokens);
            for block in 0..3 {
                let differs = whole.get(block) != other.get(block);
                assert_eq!(differs, changed / KV_BLOCK_LEN <= block, "{changed} {block}");
            }
        }
        let roots = [("model", "", "tlas"), ("mode", "l", "salt"), ("model", "s", "alt")];
        for (model, adapter, salt) in roots {
            let other = chain(Name::root(model, adapter, salt), &tokens);
            assert!((0..3).all(|block| whole.get(block) != other.get(block)), "{model} {salt}");
        }
    }

    #[test]
    fn a_chain_grows_to_the_same_names_token_by_token() {
        let tokens: Vec<u32> = (100..170).collect();
        let root = Name::root("m", "a", "s");
        let mut grown = Chain::new(root);
        for n in 0..=tokens.len() {
            grown.extend(&tokens[..n]);
            assert_eq!(grown.names.len(), n / KV_BLOCK_LEN);
        }
        assert_eq!(grown.names, chain(root, &tokens).names);
        assert_eq!((grown.before(0), grown.get(4)), (root, None));
    }
}
