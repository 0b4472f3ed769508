//! The collective over one link to each peer: every algorithm once, whatever the links.
//!
//! A group of one is a mesh without peers, not a special case for callers.

use crate::bytes;
use crate::exchange::{Fabric, Limit};
use crate::header::{Head, Kind};
use crate::history::History;
use crate::link::{Link, local};
use crate::payload::{
    Around, Blob, Blobs, Columns, Deaf, Empty, Numbers, Parts, Plain, Slices, To,
};
use crate::{
    AbortHandle, Collective, Error, MAX_WORLD_SIZE, Options, Record, ReducePlan, Stats, Tag, reduce,
};
use std::time::{Duration, Instant};

/// One rank's end of a group.
pub struct Mesh {
    rank: usize,
    world_size: usize,
    epoch: u64,
    fabric: Fabric,
    received: Vec<f32>, // parts of an all-reduce: [n_parts_of_all][width]
    slots: Vec<f32>,    // of reduce::sum
    first_error: Option<Error>,
    history: History,
}

impl Mesh {
    /// A whole group in this process, one mesh a thread.
    pub fn local(world_size: usize, epoch: u64, options: &Options) -> Result<Vec<Self>, Error> {
        assert!(
            (1..=MAX_WORLD_SIZE).contains(&world_size),
            "a group has 1 to {MAX_WORLD_SIZE} ranks"
        );
        let aborts: Vec<AbortHandle> =
            (0..world_size).map(|_| AbortHandle::new()).collect::<Result<_, _>>()?;
        let mut links: Vec<Vec<Option<Box<dyn Link>>>> =
            (0..world_size).map(|_| (0..world_size).map(|_| None).collect()).collect();
        for low in 0..world_size {
            for high in low + 1..world_size {
                let bells = [aborts[low].bell(), aborts[high].bell()];
                let (of_low, of_high) = local::pair(options.ring_capacity(), bells)
                    .map_err(|error| Error::os("memory for a local link", &error))?;
                links[low][high] = Some(of_low);
                links[high][low] = Some(of_high);
            }
        }
        let ranks = links.into_iter().zip(aborts).enumerate();
        Ok(ranks
            .map(|(rank, (links, abort))| Self::new(rank, epoch, links, options.clone(), abort))
            .collect())
    }

    /// `links` by peer rank, none at our own.
    pub(crate) fn new(
        rank: usize,
        epoch: u64,
        links: Vec<Option<Box<dyn Link>>>,
        options: Options,
        abort: AbortHandle,
    ) -> Self {
        let world_size = links.len();
        let n_links = links.iter().flatten().count();
        assert!(links[rank].is_none() && n_links == world_size - 1, "one link to each peer");
        Self {
            rank,
            world_size,
            epoch,
            fabric: Fabric::new(rank, links, options, abort),
            received: Vec::new(),
            slots: Vec::new(),
            first_error: None,
            history: History::new(),
        }
    }

    /// Runs one operation: not after a failure, and into figures and history.
    fn operate(
        &mut self,
        tag: Tag,
        kind: Kind,
        run: impl FnOnce(&mut Self, &Head) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if let Some(error) = &self.first_error {
            return Err(error.clone());
        }
        let began = Instant::now();
        let moved = |stats: &Stats| stats.bytes_sent + stats.bytes_received;
        let moved_before = moved(&self.fabric.stats);
        let head = Head { epoch: self.epoch, tag, kind };
        let result = match self.fabric.abort().check() {
            Ok(()) => run(self, &head),
            Err(error) => Err(error),
        };
        let spent = began.elapsed();
        self.fabric.stats.n_ops += 1;
        self.fabric.stats.spent += spent;
        self.history.push(Record {
            tag,
            kind,
            bytes: moved(&self.fabric.stats) - moved_before,
            micros: spent.as_micros().try_into().unwrap_or(u32::MAX),
            ok: result.is_ok(),
        });
        result.inspect_err(|error| self.fail(error))
    }

    fn fail(&mut self, error: &Error) {
        self.first_error.get_or_insert_with(|| error.clone());
        self.fabric.close();
    }

    fn limit(&self) -> Limit {
        Limit { deadline: Instant::now() + self.fabric.options().step_timeout, once_begun: None }
    }

    fn check_bound(&self, bytes: usize) -> Result<(), Error> {
        let max = self.fabric.options().max_message_bytes;
        if bytes > max { Err(Error::TooLong { bytes, max }) } else { Ok(()) }
    }

    /// One hop: own parts to all, then every rank sums everything.
    fn one_shot(
        &mut self,
        head: &Head,
        plan: &ReducePlan,
        parts: &[f32],
        out: &mut [f32],
    ) -> Result<(), Error> {
        let width = out.len();
        let limit = self.limit();
        grow(&mut self.received, plan.n_parts_of_all() * width);
        grow(&mut self.slots, reduce::scratch_len(plan));
        let to = if plan.n_parts(self.rank) == 0 { To::Nobody } else { To::All };
        let outbox = Plain { bytes: bytes::of(parts), to };
        let mut inbox = Parts { plan, width, received: &mut self.received };
        self.fabric.exchange(head, &outbox, &mut inbox, limit)?;
        let mine = plan.part_range(self.rank);
        let received = &self.received;
        let part = |i: usize| match i.checked_sub(mine.start) {
            Some(at) if i < mine.end => &parts[at * width..][..width],
            Some(_) | None => &received[i * width..][..width],
        };
        reduce::sum(plan, part, out, &mut self.slots);
        Ok(())
    }

    /// Two hops: each rank sums one slice of the elements over all parts, then the slices go to
    /// all.
    fn two_shot(
        &mut self,
        head: &Head,
        plan: &ReducePlan,
        parts: &[f32],
        out: &mut [f32],
    ) -> Result<(), Error> {
        let slices = Slices { len: out.len(), world_size: self.world_size };
        let slice = slices.of(self.rank);
        let width = slice.len();
        let limit = self.limit();
        let deadline = limit.deadline;
        grow(&mut self.received, plan.n_parts_of_all() * width);
        grow(&mut self.slots, reduce::scratch_len(plan));
        let outbox = Columns { parts, n_parts: plan.n_parts(self.rank), slices };
        let mut inbox = Parts { plan, width, received: &mut self.received };
        let scatter = Head { kind: Kind::ReduceScatter, ..*head };
        self.fabric.exchange(&scatter, &outbox, &mut inbox, limit)?;

        let (before, rest) = out.split_at_mut(slice.start);
        let (sum, after) = rest.split_at_mut(width);
        let mine = plan.part_range(self.rank);
        let received = &self.received;
        let part = |i: usize| match i.checked_sub(mine.start) {
            Some(at) if i < mine.end => &parts[at * slices.len + slice.start..][..width],
            Some(_) | None => &received[i * width..][..width],
        };
        reduce::sum(plan, part, sum, &mut self.slots);

        let outbox = Plain { bytes: bytes::of(sum), to: To::All };
        let mut inbox = Around { before, after, slice, slices };
        let gather = Head { kind: Kind::SliceGather, ..*head };
        self.fabric.exchange(&gather, &outbox, &mut inbox, Limit { deadline, once_begun: None })
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if self.first_error.is_none() {
            self.fabric.leave();
        }
    }
}

impl Collective for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn all_reduce(
        &mut self,
        tag: Tag,
        plan: &ReducePlan,
        parts: &[f32],
        out: &mut [f32],
    ) -> Result<(), Error> {
        assert_eq!(plan.world_size(), self.world_size, "the plan is for this group");
        let n_parts = plan.n_parts(self.rank);
        assert_eq!(parts.len(), n_parts * out.len(), "{n_parts} parts as long as the result");
        let most_bytes = plan.max_parts() * size_of_val(out);
        let is_large = most_bytes > self.fabric.options().two_shot_bytes;
        self.operate(tag, Kind::AllReduce, |mesh, head| {
            if is_large && mesh.world_size > 2 {
                mesh.two_shot(head, plan, parts, out)
            } else {
                mesh.one_shot(head, plan, parts, out)
            }
        })
    }

    fn all_gather(&mut self, tag: Tag, mine: &[u8], out: &mut Vec<Vec<u8>>) -> Result<(), Error> {
        self.operate(tag, Kind::AllGather, |mesh, head| {
            mesh.check_bound(mine.len())?;
            out.resize_with(mesh.world_size, Vec::new);
            let max = mesh.fabric.options().max_message_bytes;
            let limit = mesh.limit();
            let outbox = Plain { bytes: mine, to: To::All };
            mesh.fabric.exchange(head, &outbox, &mut Blobs { out, max }, limit)?;
            out[mesh.rank].clear();
            out[mesh.rank].extend_from_slice(mine);
            Ok(())
        })
    }

    fn gather(
        &mut self,
        tag: Tag,
        root: usize,
        mine: &[f32],
        out: &mut [Vec<f32>],
    ) -> Result<(), Error> {
        assert!(root < self.world_size, "root {root} is a rank");
        let is_root = root == self.rank;
        assert!(!is_root || out.len() == self.world_size, "the root has one vector a rank");
        self.operate(tag, Kind::Gather, |mesh, head| {
            mesh.check_bound(size_of_val(mine))?;
            let max = mesh.fabric.options().max_message_bytes;
            let limit = mesh.limit();
            if !is_root {
                let outbox = Plain { bytes: bytes::of(mine), to: To::One(root) };
                return mesh.fabric.exchange(head, &outbox, &mut Deaf, limit);
            }
            let outbox = Plain { bytes: &[], to: To::Nobody };
            mesh.fabric.exchange(head, &outbox, &mut Numbers { out, max }, limit)
        })
    }

    fn broadcast(
        &mut self,
        tag: Tag,
        root: usize,
        bytes: &mut Vec<u8>,
        wait: Duration,
    ) -> Result<(), Error> {
        assert!(root < self.world_size, "root {root} is a rank");
        self.operate(tag, Kind::Broadcast, |mesh, head| {
            if root == mesh.rank {
                mesh.check_bound(bytes.len())?;
                let limit = mesh.limit();
                let outbox = Plain { bytes, to: To::All };
                return mesh.fabric.exchange(head, &outbox, &mut Deaf, limit);
            }
            let within = mesh.fabric.options().step_timeout;
            let limit = Limit { deadline: Instant::now() + wait, once_begun: Some(within) };
            let max = mesh.fabric.options().max_message_bytes;
            let outbox = Plain { bytes: &[], to: To::Nobody };
            mesh.fabric.exchange(head, &outbox, &mut Blob { root, max, out: bytes }, limit)
        })
    }

    fn barrier(&mut self, tag: Tag) -> Result<(), Error> {
        self.operate(tag, Kind::Barrier, |mesh, head| {
            let limit = mesh.limit();
            let outbox = Plain { bytes: &[], to: To::All };
            mesh.fabric.exchange(head, &outbox, &mut Empty, limit)
        })
    }

    fn check(&mut self) -> Result<(), Error> {
        if let Some(error) = &self.first_error {
            return Err(error.clone());
        }
        let result = self.fabric.abort().check().and_then(|()| self.fabric.check_peers());
        result.inspect_err(|error| self.fail(error))
    }

    fn set_step_timeout(&mut self, timeout: Duration) {
        self.fabric.options_mut().step_timeout = timeout;
    }

    fn step_timeout(&self) -> Duration {
        self.fabric.options().step_timeout
    }

    fn abort_handle(&self) -> AbortHandle {
        self.fabric.abort().clone()
    }

    fn links(&self) -> Vec<&'static str> {
        let mut links = vec!["self"; self.world_size];
        self.fabric.kinds().for_each(|(peer, kind)| links[peer] = kind);
        links
    }

    fn history(&self) -> Vec<Record> {
        self.history.iter().copied().collect()
    }

    fn take_stats(&mut self) -> Stats {
        std::mem::take(&mut self.fabric.stats)
    }
}

/// Scratch only ever grows: no allocation once warm.
fn grow(scratch: &mut Vec<f32>, len: usize) {
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn ranks_of_different_epochs_refuse_each_other() {
        let aborts = [AbortHandle::new().unwrap(), AbortHandle::new().unwrap()];
        let (one, other) = local::pair(4096, [aborts[0].bell(), aborts[1].bell()]).unwrap();
        let ends = [vec![None, Some(one)], vec![Some(other), None]];
        let ranks = ends.into_iter().zip(aborts).enumerate();
        let threads: Vec<_> = ranks
            .map(|(rank, (links, abort))| {
                let mut mesh = Mesh::new(rank, 7 + rank as u64, links, Options::default(), abort);
                thread::spawn(move || mesh.barrier(Tag::default()).unwrap_err())
            })
            .collect();
        let errors: Vec<Error> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let of_zero = Error::Mismatch { field: "epoch", expected: 7, got: 8, peer: 1 };
        let of_one = Error::Mismatch { field: "epoch", expected: 8, got: 7, peer: 0 };
        assert!(errors[0] == of_zero || errors[1] == of_one, "{errors:?}");
    }

    #[test]
    fn scratch_grows_once() {
        let mut alone = Mesh::local(1, 1, &Options::default()).unwrap().remove(0);
        let plan = ReducePlan::new(&crate::SumTree::balanced(5), std::slice::from_ref(&(0..5)));
        let mut out = vec![0.0; 100];
        alone.all_reduce(Tag::default(), &plan, &[1.5; 100], &mut out).unwrap();
        assert_eq!(out, [1.5; 100]);
        let before = (alone.received.as_ptr(), alone.slots.as_ptr());
        alone.all_reduce(Tag::default(), &plan, &[2.5; 50], &mut out[..50]).unwrap();
        assert_eq!((alone.received.as_ptr(), alone.slots.as_ptr()), before);
    }
}
