//! The contract of `Collective`, run on every kind of link.

#![allow(clippy::unwrap_used)]

mod common;

use common::{
    EPOCH, Net, assert_links, group, on_threads, options, tag, this_thread, until_asleep,
};
use evener_collective::{Collective, Error, Mesh, Options, ReducePlan, SumTree, Tag};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How much later than it must an event may be seen, on a busy machine of two cores.
const SLACK: Duration = Duration::from_millis(700);

macro_rules! conformance {
    ($($name:ident: $net:expr),*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn operations_agree_with_a_plain_computation() {
                super::operations_agree_with_a_plain_computation($net);
            }

            #[test]
            fn a_stalled_rank_times_the_others_out() {
                super::a_stalled_rank_times_the_others_out($net);
            }

            #[test]
            fn an_abort_ends_a_sleeping_rank_and_then_its_peers() {
                super::an_abort_ends_a_sleeping_rank_and_then_its_peers($net);
            }

            #[test]
            fn a_rank_that_leaves_fails_the_others_at_once() {
                super::a_rank_that_leaves_fails_the_others_at_once($net);
            }

            #[test]
            fn a_rank_may_leave_while_others_finish_its_last_operation() {
                super::a_rank_may_leave_while_others_finish_its_last_operation($net);
            }

            #[test]
            fn what_is_too_long_is_sent_by_nobody() {
                super::what_is_too_long_is_sent_by_nobody($net);
            }

            #[test]
            fn ranks_out_of_step_are_told_which_field_differs() {
                super::ranks_out_of_step_are_told_which_field_differs($net);
            }

            #[test]
            fn an_idle_follower_sleeps_and_wakes_at_once() {
                super::an_idle_follower_sleeps_and_wakes_at_once($net);
            }

            #[test]
            fn an_idle_lead_can_see_a_lost_peer() {
                super::an_idle_lead_can_see_a_lost_peer($net);
            }
        }
    )*};
}

conformance!(local: Net::Local, shm: Net::Shm, tcp: Net::Tcp, mixed: Net::Mixed);

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// One all-reduce, the same on all ranks: the leaves, who owns them, and their sum by the whole
/// tree.
struct Sum {
    plan: ReducePlan,
    parts_by_rank: Vec<Vec<f32>>,
    sum: Vec<f32>,
}

impl Sum {
    fn random(rng: &mut StdRng, world_size: usize) -> Self {
        let len = match rng.random_range(0..4) {
            0 => rng.random_range(0..4),
            1 => rng.random_range(0..2000),
            2 => 576,
            _ => rng.random_range(0..40_000),
        };
        let groups: Vec<usize> =
            (0..rng.random_range(1..4)).map(|_| rng.random_range(1..6)).collect();
        let tree = SumTree::nested(&groups);
        let n_leaves = tree.n_leaves();
        let leaves: Vec<Vec<f32>> = (0..n_leaves)
            .map(|_| (0..len).map(|_| rng.random_range(-1e3..1e3)).collect())
            .collect();
        let mut cuts: Vec<usize> =
            (1..world_size).map(|_| rng.random_range(0..=n_leaves)).collect();
        cuts.extend([0, n_leaves]);
        cuts.sort_unstable();
        let ranges: Vec<Range<usize>> = cuts.windows(2).map(|pair| pair[0]..pair[1]).collect();
        let plan = ReducePlan::new(&tree, &ranges);
        let parts_by_rank = (0..world_size)
            .map(|rank| {
                let parts = plan.parts(rank).iter();
                parts.flat_map(|part| subtree_sum(&tree, part.clone(), &leaves)).collect()
            })
            .collect();
        Self { plan, parts_by_rank, sum: subtree_sum(&tree, 0..n_leaves, &leaves) }
    }
}

fn subtree_sum(tree: &SumTree, part: Range<usize>, leaves: &[Vec<f32>]) -> Vec<f32> {
    let mut stack: Vec<Vec<f32>> = Vec::new();
    for (leaf, n_merges) in part.clone().zip(tree.merges(part)) {
        stack.push(leaves[leaf].clone());
        for _ in 0..n_merges {
            let right = stack.pop().unwrap();
            let left = stack.pop().unwrap();
            stack.push(left.iter().zip(right).map(|(left, right)| left + right).collect());
        }
    }
    stack.pop().unwrap()
}

/// One round of every operation; what each rank puts in is known to all.
struct Round {
    sum: Sum,
    blobs: Vec<Vec<u8>>,
    numbers: Vec<Vec<f32>>,
    root: usize,
    tokens: Vec<f32>, // of the root; the others have zeros
}

impl Round {
    fn random(rng: &mut StdRng, world_size: usize) -> Self {
        let mut size = |max: usize| {
            let max = [1, max / 50, max][rng.random_range(0..3)];
            rng.random_range(0..=max)
        };
        let blob_sizes: Vec<usize> = (0..world_size).map(|_| size(200_000)).collect();
        let number_sizes: Vec<usize> = (0..world_size).map(|_| size(50_000)).collect();
        let random_blob = |n: usize, rng: &mut StdRng| {
            let mut blob = vec![0; n];
            rng.fill(&mut blob[..]);
            blob
        };
        Self {
            sum: Sum::random(rng, world_size),
            blobs: blob_sizes.into_iter().map(|n| random_blob(n, rng)).collect(),
            numbers: number_sizes
                .into_iter()
                .map(|n| (0..n).map(|_| rng.random_range(-1.0..1.0)).collect())
                .collect(),
            root: rng.random_range(0..world_size),
            tokens: (0..100).map(|_| rng.random_range(1.0..2.0)).collect(),
        }
    }

    fn run(&self, mesh: &mut Mesh, step: u64) {
        let (rank, root) = (mesh.rank(), self.root);
        let op = |op: u32| Tag { step, op };
        let mut sum = vec![f32::NAN; self.sum.sum.len()];
        let parts = &self.sum.parts_by_rank[rank];
        mesh.all_reduce(op(0), &self.sum.plan, parts, &mut sum).unwrap();
        assert_eq!(bits(&sum), bits(&self.sum.sum), "all_reduce");

        let mut blobs = vec![vec![1, 2, 3]];
        mesh.all_gather(op(1), &self.blobs[rank], &mut blobs).unwrap();
        assert!(blobs == self.blobs, "all_gather");

        let mut numbers = vec![vec![0.5]; if rank == root { mesh.world_size() } else { 0 }];
        mesh.gather(op(2), root, &self.numbers[rank], &mut numbers).unwrap();
        let got = |peer: usize| peer == root || numbers[peer] == self.numbers[peer];
        assert!(rank != root || (0..numbers.len()).all(got), "gather");

        let mut blob = if rank == root { self.blobs[root].clone() } else { vec![9; 7] };
        mesh.broadcast(op(3), root, &mut blob, Duration::from_secs(10)).unwrap();
        assert!(blob == self.blobs[root], "broadcast");

        let any = ReducePlan::any_order(mesh.world_size());
        let mine = if rank == root { self.tokens.clone() } else { vec![0.0; self.tokens.len()] };
        let mut tokens = vec![f32::NAN; mine.len()];
        mesh.all_reduce(op(4), &any, &mine, &mut tokens).unwrap();
        assert_eq!(tokens, self.tokens, "any order");

        mesh.barrier(op(5)).unwrap();
    }
}

fn operations_agree_with_a_plain_computation(net: Net) {
    let seed: u64 = rand::random();
    println!("{net:?}: seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for world_size in 1..=8 {
        let options = Options {
            ring_bytes: [1 << 12, 1 << 16, 1 << 18][rng.random_range(0..3)],
            two_shot_bytes: 8 << 10,
            step_timeout: Duration::from_secs(20),
            ..options()
        };
        let meshes = group(net, world_size, &options);
        let rounds: Vec<Round> = (0..20).map(|_| Round::random(&mut rng, world_size)).collect();
        on_threads(meshes, |mut mesh| {
            assert_links(net, &mesh);
            assert_eq!((mesh.world_size(), mesh.epoch()), (world_size, EPOCH));
            for (step, round) in rounds.iter().enumerate() {
                round.run(&mut mesh, step as u64);
            }
            let n_ops = 6 * rounds.len();
            assert_eq!(mesh.take_stats().n_ops, n_ops as u64);
            assert_eq!(mesh.take_stats().n_ops, 0, "taken");
            assert_eq!(mesh.history().iter().filter(|record| record.ok).count(), n_ops);
        });
    }
}

/// Runs `rank` on all, and says what each came to and how long after `since` at the latest.
fn errors_of(
    meshes: Vec<Mesh>,
    rank: impl Fn(&mut Mesh) -> Result<(), Error> + Sync,
) -> (Vec<Error>, Duration) {
    let began = Instant::now();
    let errors = on_threads(meshes, |mut mesh| {
        let error = rank(&mut mesh).unwrap_err();
        assert_eq!(mesh.barrier(tag(99)), Err(error.clone()), "the first error stays");
        error
    });
    (errors, began.elapsed())
}

fn a_stalled_rank_times_the_others_out(net: Net) {
    let step_timeout = Duration::from_millis(150);
    let mut meshes = group(net, 4, &Options { step_timeout, ..options() });
    let stalled = meshes.remove(2);
    let (errors, took) = errors_of(meshes, |mesh| mesh.barrier(tag(3)));
    assert!(took >= step_timeout && took < step_timeout + SLACK, "{took:?}");
    let mut n_timeouts = 0;
    for error in errors {
        match error {
            Error::Timeout { tag: got, peers, .. } => {
                assert_eq!((got, peers.contains(&2)), (tag(3), true));
                n_timeouts += 1;
            }
            Error::PeerLost { peer, .. } => assert_ne!(peer, 2, "it is there, only late"),
            other => panic!("{other}"),
        }
    }
    assert!(n_timeouts > 0);
    drop(stalled);
}

fn an_abort_ends_a_sleeping_rank_and_then_its_peers(net: Net) {
    let mut meshes = group(net, 3, &options());
    let late = meshes.pop();
    let abort = meshes[0].abort_handle();
    let (send, threads) = mpsc::channel();
    let mut aborted_at = None;
    let errors = thread::scope(|scope| {
        let ranks: Vec<_> = meshes
            .into_iter()
            .map(|mut mesh| {
                let send = send.clone();
                scope.spawn(move || {
                    send.send(this_thread()).unwrap();
                    let error = mesh.barrier(tag(1)).unwrap_err();
                    (error, Instant::now())
                })
            })
            .collect();
        for _ in &ranks {
            until_asleep(&threads.recv().unwrap());
        }
        aborted_at = Some(Instant::now());
        abort.abort("the epoch is over");
        abort.abort("too late to change the reason");
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(errors[0].0, Error::Aborted { reason: "the epoch is over".into() });
    assert!(matches!(errors[1].0, Error::PeerLost { peer: 0, .. }), "{:?}", errors[1].0);
    for (error, at) in errors {
        assert!(at - aborted_at.unwrap() < SLACK, "{error} took too long");
    }
    drop(late);
}

fn a_rank_that_leaves_fails_the_others_at_once(net: Net) {
    for n_before in [0, 3] {
        let meshes = group(net, 4, &options());
        let left_at = std::sync::Mutex::new(None);
        let plan = ReducePlan::any_order(4);
        // Who fails closes its links at once, which ends the operation of one that lags behind.
        let all_are_here = std::sync::Barrier::new(4);
        let seen = on_threads(meshes, |mut mesh| {
            let mut out = vec![0.0; 30_000];
            for step in 0..n_before {
                mesh.all_reduce(tag(step), &plan, &out.clone(), &mut out).unwrap();
            }
            all_are_here.wait();
            if mesh.rank() == 1 {
                drop(mesh);
                *left_at.lock().unwrap() = Some(Instant::now());
                return None;
            }
            let error = mesh.all_reduce(tag(9), &plan, &out.clone(), &mut out).unwrap_err();
            Some((error, Instant::now()))
        });
        let left_at = left_at.lock().unwrap().unwrap();
        for (error, at) in seen.into_iter().flatten() {
            assert!(matches!(error, Error::PeerLost { .. }), "{error}");
            assert!(at.saturating_duration_since(left_at) < SLACK, "{error} took too long");
        }
    }
}

fn a_rank_may_leave_while_others_finish_its_last_operation(net: Net) {
    let mut meshes = group(net, 3, &options());
    let mut last = meshes.pop().unwrap();
    let mut first_to_leave = meshes.pop().unwrap();
    let mut root = meshes.pop().unwrap();
    let (send, threads) = mpsc::channel();
    thread::scope(|scope| {
        let gathering = scope.spawn(move || {
            send.send(this_thread()).unwrap();
            let mut out = vec![Vec::new(); 3];
            root.gather(tag(1), 0, &[0.0], &mut out).unwrap();
            out
        });
        first_to_leave.gather(tag(1), 0, &[1.0], &mut []).unwrap();
        drop(first_to_leave);
        until_asleep(&threads.recv().unwrap());
        last.gather(tag(1), 0, &[2.0], &mut []).unwrap();
        assert_eq!(gathering.join().unwrap(), [vec![], vec![1.0], vec![2.0]]);
    });
    let error = last.barrier(tag(2)).unwrap_err();
    assert!(matches!(error, Error::PeerLost { .. }), "{error}");
}

fn what_is_too_long_is_sent_by_nobody(net: Net) {
    let max_message_bytes = 1000;
    let meshes = group(net, 2, &Options { max_message_bytes, ..options() });
    let (errors, _) = errors_of(meshes, |mesh| {
        let mut out = Vec::new();
        mesh.all_gather(tag(1), &vec![1; max_message_bytes], &mut out)?;
        assert_eq!(out, vec![vec![1; max_message_bytes]; 2]);
        mesh.all_gather(tag(2), &vec![1; max_message_bytes + mesh.rank()], &mut out)
    });
    assert!(matches!(errors[0], Error::PeerLost { peer: 1, .. }), "{:?}", errors[0]);
    assert_eq!(errors[1], Error::TooLong { bytes: 1001, max: 1000 });
}

fn ranks_out_of_step_are_told_which_field_differs(net: Net) {
    type Op = fn(&mut Mesh) -> Result<(), Error>;
    let right: Op = |mesh| mesh.barrier(Tag { step: 5, op: 6 });
    let sum = |mesh: &mut Mesh, len: usize| {
        let plan = ReducePlan::any_order(mesh.world_size());
        mesh.all_reduce(Tag { step: 5, op: 6 }, &plan, &vec![1.0; len], &mut vec![0.0; len])
    };
    let reduces_10: Op = |mesh| {
        let plan = ReducePlan::any_order(mesh.world_size());
        mesh.all_reduce(Tag { step: 5, op: 6 }, &plan, &[1.0; 10], &mut [0.0; 10])
    };
    let cases: [(&str, Op, Op); 3] = [
        ("step", right, |mesh| mesh.barrier(Tag { step: 4, op: 6 })),
        ("op", right, |mesh| mesh.barrier(Tag { step: 5, op: 7 })),
        ("kind", right, reduces_10),
    ];
    let check = |name: &str, errors: &[Error]| {
        let is_named =
            |error: &Error| matches!(error, Error::Mismatch { field, .. } if *field == name);
        let is_lost = |error: &Error| matches!(error, Error::PeerLost { .. });
        assert!(errors.iter().any(is_named), "{name}: {errors:?}");
        assert!(errors.iter().all(|error| is_named(error) || is_lost(error)), "{name}: {errors:?}");
    };
    for (name, of_zero, of_one) in cases {
        let (errors, took) = errors_of(group(net, 2, &options()), |mesh| {
            if mesh.rank() == 0 { of_zero(mesh) } else { of_one(mesh) }
        });
        check(name, &errors);
        assert!(took < SLACK, "{name} took {took:?}");
    }
    let (errors, _) =
        errors_of(group(net, 3, &options()), |mesh| sum(mesh, 100 + mesh.rank() * 10));
    check("length", &errors);
}

fn an_idle_follower_sleeps_and_wakes_at_once(net: Net) {
    let mut meshes = group(net, 3, &options());
    let mut lead = meshes.remove(0);
    let (send, threads) = mpsc::channel();
    let mut took: Vec<Duration> = thread::scope(|scope| {
        let (report, reports) = mpsc::channel();
        for mut mesh in meshes {
            let (send, report) = (send.clone(), report.clone());
            scope.spawn(move || {
                send.send(this_thread()).unwrap();
                for step in 0..20 {
                    let mut bytes = Vec::new();
                    mesh.broadcast(tag(step), 0, &mut bytes, Duration::from_secs(30)).unwrap();
                    report.send((bytes.len(), Instant::now())).unwrap();
                }
                assert!(mesh.take_stats().n_parks > 0);
                let mut bytes = Vec::new();
                // Whoever is done waiting first leaves, and the others lose it.
                let wait = Duration::from_millis(30);
                let error = mesh.broadcast(tag(20), 0, &mut bytes, wait).unwrap_err();
                assert!(matches!(error, Error::Timeout { .. } | Error::PeerLost { .. }), "{error}");
            });
        }
        let threads = [threads.recv().unwrap(), threads.recv().unwrap()];
        let took = (0..20).map(|step| {
            threads.iter().for_each(|thread| until_asleep(thread));
            let began = Instant::now();
            lead.broadcast(tag(step), 0, &mut vec![7; 5000], Duration::ZERO).unwrap();
            let both = [reports.recv().unwrap(), reports.recv().unwrap()];
            assert!(both.iter().all(|&(n, _)| n == 5000));
            both.iter().map(|&(_, at)| at.saturating_duration_since(began)).max().unwrap()
        });
        took.collect()
    });
    took.sort();
    // A missed wake-up would be found after a slice of 20 ms only.
    assert!(took[took.len() / 2] < Duration::from_millis(10), "{took:?}");
}

fn an_idle_lead_can_see_a_lost_peer(net: Net) {
    let mut meshes = group(net, 3, &options());
    let mut lead = meshes.remove(0);
    lead.check().unwrap();
    drop(meshes.pop());
    let mut error = None;
    common::until("a lost peer", || {
        error = lead.check().err();
        error.is_some()
    });
    assert!(matches!(error, Some(Error::PeerLost { peer: 2, .. })), "{error:?}");
    assert_eq!(lead.barrier(tag(1)).err(), error);
}
