//! Blocks in the order of their last use: a list threaded through one array, so that each move is
//! constant work and allocates nothing. It does not know what a block is.

/// A set of numbers below a bound, in order.
#[derive(Debug)]
pub struct Lru {
    /// By number: those before and after it, if it is in the list.
    links: Vec<Link>,
    first: Option<u32>,
    last: Option<u32>,
    len: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Link {
    before: Option<u32>,
    after: Option<u32>,
}

impl Lru {
    /// Empty, for numbers below `bound`.
    #[must_use]
    pub fn new(bound: usize) -> Self {
        Self { links: vec![Link::default(); bound], first: None, last: None, len: 0 }
    }

    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Adds a number that is not in the list.
    pub fn push_last(&mut self, n: u32) {
        self.links[n as usize] = Link { before: self.last, after: None };
        match self.last {
            Some(last) => self.links[last as usize].after = Some(n),
            None => self.first = Some(n),
        }
        self.last = Some(n);
        self.len += 1;
    }

    /// Takes out the number that was added before all others.
    pub fn pop_first(&mut self) -> Option<u32> {
        let first = self.first?;
        self.remove(first);
        Some(first)
    }

    /// Takes out a number that is in the list.
    pub fn remove(&mut self, n: u32) {
        let Link { before, after } = std::mem::take(&mut self.links[n as usize]);
        match before {
            Some(before) => self.links[before as usize].after = after,
            None => self.first = after,
        }
        match after {
            Some(after) => self.links[after as usize].before = before,
            None => self.last = before,
        }
        self.len -= 1;
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        std::iter::successors(self.first, |&n| self.links[n as usize].after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_gives_back_in_the_order_it_took() {
        let mut lru = Lru::new(6);
        [3, 0, 5, 1].into_iter().for_each(|n| lru.push_last(n));
        for (out, left) in [(5, vec![3, 0, 1]), (3, vec![0, 1]), (1, vec![0]), (0, vec![])] {
            lru.remove(out);
            assert_eq!(lru.iter().collect::<Vec<_>>(), left);
            assert_eq!(lru.len() as usize, left.len());
        }
        [2, 4].into_iter().for_each(|n| lru.push_last(n));
        assert_eq!([lru.pop_first(), lru.pop_first(), lru.pop_first()], [Some(2), Some(4), None]);
    }
}
