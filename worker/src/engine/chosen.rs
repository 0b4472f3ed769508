//! The tokens that a step brought its sequences, by entry of its plan: none if there are known ones
//! left to compute, one, or one more than there were drafts that were right.

/// Kept between steps for its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chosen {
    tokens: Vec<u32>,
    /// By entry: where its tokens end.
    ends: Vec<usize>,
}

impl Chosen {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.ends.clear();
    }

    /// Another token of the next entry.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
    }

    /// The next entry has all its tokens.
    pub fn end_entry(&mut self) {
        self.ends.push(self.tokens.len());
    }

    #[must_use]
    pub fn n_entries(&self) -> usize {
        self.ends.len()
    }

    #[must_use]
    pub fn of(&self, entry_idx: usize) -> &[u32] {
        let start = entry_idx.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.tokens[start..self.ends[entry_idx]]
    }
}

/// One token or none of each entry.
impl FromIterator<Option<u32>> for Chosen {
    fn from_iter<I: IntoIterator<Item = Option<u32>>>(entries: I) -> Self {
        let mut chosen = Self::default();
        for token in entries {
            chosen.tokens.extend(token);
            chosen.end_entry();
        }
        chosen
    }
}
