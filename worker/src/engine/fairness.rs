//! How much each user was served, so that the next place goes to whoever had least: virtual token
//! counters (Sheng et al. 2024, "Fairness in Serving Large Language Models", algorithm 2). Pure.
//!
//! A position computed for the first time costs one, a token generated one more: a prompt token 1,
//! a token of the answer 2, as in the paper; what the cache spared costs nothing. A user who comes
//! begins with the least of those present, so that nobody saves up a claim while away.

use std::collections::HashMap;

/// Names a user while sequences of theirs are here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account(usize);

/// The users that have sequences here; no more than there are sequences.
#[derive(Debug, Default)]
pub struct Fairness {
    by_user: HashMap<String, usize>,
    books: Vec<Book>,
    /// Indices into `books` that nobody has.
    vacant: Vec<usize>,
}

#[derive(Debug)]
struct Book {
    user: String,
    n_sequences: usize,
    served: u64,
}

impl Fairness {
    /// Another sequence of `user`.
    pub fn enter(&mut self, user: &str) -> Account {
        if let Some(&at) = self.by_user.get(user) {
            self.books[at].n_sequences += 1;
            return Account(at);
        }
        let present = self.books.iter().filter(|book| book.n_sequences > 0);
        let served = present.map(|book| book.served).min().unwrap_or(0);
        let book = Book { user: user.to_owned(), n_sequences: 1, served };
        let at = match self.vacant.pop() {
            Some(at) => {
                self.books[at] = book;
                at
            }
            None => {
                self.books.push(book);
                self.books.len() - 1
            }
        };
        self.by_user.insert(user.to_owned(), at);
        Account(at)
    }

    /// A sequence of the user is gone; with the last one the user is forgotten.
    pub fn leave(&mut self, Account(at): Account) {
        let book = &mut self.books[at];
        book.n_sequences -= 1;
        if book.n_sequences == 0 {
            self.by_user.remove(&book.user);
            self.vacant.push(at);
        }
    }

    pub fn charge(&mut self, Account(at): Account, cost: usize) {
        self.books[at].served += cost as u64;
    }

    #[must_use]
    pub fn served(&self, Account(at): Account) -> u64 {
        self.books[at].served
    }

    #[must_use]
    pub fn n_users(&self) -> usize {
        self.by_user.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_comes_begins_with_the_least_of_those_present() {
        let mut fairness = Fairness::default();
        let a = fairness.enter("a");
        fairness.charge(a, 100);
        let b = fairness.enter("b");
        assert_eq!(fairness.served(b), 100, "b has no claim on what a got before");
        fairness.charge(b, 7);
        assert_eq!(fairness.enter("a"), a);
        let c = fairness.enter("c");
        assert_eq!([a, b, c].map(|account| fairness.served(account)), [100, 107, 100]);
    }

    #[test]
    fn users_are_forgotten_with_their_last_sequence() {
        let mut fairness = Fairness::default();
        for round in 0..100 {
            let a = fairness.enter(&format!("user {round}"));
            assert_eq!(fairness.enter(&format!("user {round}")), a);
            fairness.charge(a, 5);
            fairness.leave(a);
            assert_eq!((fairness.n_users(), fairness.served(a)), (1, 5));
            fairness.leave(a);
            assert_eq!(fairness.n_users(), 0);
        }
        assert_eq!(fairness.books.len(), 1, "places are used again");
    }
}
