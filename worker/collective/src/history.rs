//! The last operations of a rank, kept without allocating, for the log after an abort.
//!
//! Two ranks that disagree about what came when are found by laying their histories side by side.

use crate::{Kind, Tag};
use std::fmt;

const N_RECORDS: usize = 4096;

/// One finished or failed operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub tag: Tag,
    pub kind: Kind,
    /// Sent and received, with headers.
    pub bytes: u64,
    pub micros: u32,
    pub ok: bool,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tag, kind, bytes, micros, ok } = self;
        let end = if *ok { "" } else { " failed" };
        write!(f, "step {} op {} {kind} {bytes} B {micros} us{end}", tag.step, tag.op)
    }
}

#[derive(Debug)]
pub(crate) struct History {
    records: Vec<Record>, // at most N_RECORDS, allocated at once
    next: usize,          // where the next goes once the ring is full
}

impl History {
    pub fn new() -> Self {
        Self { records: Vec::with_capacity(N_RECORDS), next: 0 }
    }

    pub fn push(&mut self, record: Record) {
        if self.records.len() < N_RECORDS {
            self.records.push(record);
        } else {
            self.records[self.next] = record;
            self.next = (self.next + 1) % N_RECORDS;
        }
    }

    /// Oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Record> {
        self.records[self.next..].iter().chain(&self.records[..self.next])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> Record {
        Record { tag: Tag { step, op: 0 }, kind: Kind::Barrier, bytes: 0, micros: 0, ok: true }
    }

    #[test]
    fn the_newest_records_stay_in_order() {
        for n in [0, 1, N_RECORDS, N_RECORDS + 1, 3 * N_RECORDS + 7] {
            let mut history = History::new();
            (0..n).for_each(|step| history.push(record(step as u64)));
            let kept: Vec<u64> = history.iter().map(|record| record.tag.step).collect();
            let expected: Vec<u64> = (n.saturating_sub(N_RECORDS)..n).map(|n| n as u64).collect();
            assert_eq!(kept, expected, "{n} pushed");
        }
    }
}
