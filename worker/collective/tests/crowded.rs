//! More ranks than cores: they take turns by yielding, and an operation costs turns, not time
//! slices.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Net, group, on_threads, options, tag};
use evener_collective::{Collective, ReducePlan};
use std::time::{Duration, Instant};

const N_RANKS: usize = 4;
const N_CORES: usize = 2;
const N_ROUNDS: usize = 300;
/// A slice of the system's scheduler is about 3 ms; four yields are some microseconds. On a machine
/// with other work only the quicker rounds tell the two apart.
const TURNS: Duration = Duration::from_millis(1);

/// Two of the cores that this process may use.
fn stay_on_few_cores() {
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let (mut allowed, mut few): (libc::cpu_set_t, libc::cpu_set_t) = unsafe { std::mem::zeroed() };
    let size = size_of_val(&allowed);
    // SAFETY: the kernel writes one live cpu_set_t; 0 is the calling thread.
    assert_eq!(unsafe { libc::sched_getaffinity(0, size, &mut allowed) }, 0);
    // SAFETY: every core asked about is below CPU_SETSIZE.
    let is_allowed = |core: &usize| unsafe { libc::CPU_ISSET(*core, &allowed) };
    for core in (0..libc::CPU_SETSIZE as usize).filter(is_allowed).take(N_CORES) {
        // SAFETY: as above.
        unsafe { libc::CPU_SET(core, &mut few) };
    }
    // SAFETY: the kernel reads one live cpu_set_t; 0 is the calling thread.
    assert_eq!(unsafe { libc::sched_setaffinity(0, size, &few) }, 0);
}

#[test]
fn ranks_that_outnumber_cores_take_turns() {
    let plan = ReducePlan::any_order(N_RANKS);
    for net in [Net::Local, Net::Shm, Net::Tcp] {
        let meshes = group(net, N_RANKS, &options());
        let took = on_threads(meshes, |mut mesh| {
            stay_on_few_cores();
            let part = vec![mesh.rank() as f32 + 1.0; 2048];
            let mut sum = vec![0.0; part.len()];
            let mut took: Vec<Duration> = (1..=N_ROUNDS)
                .map(|round| {
                    let began = Instant::now();
                    mesh.all_reduce(tag(round as u64), &plan, &part, &mut sum).unwrap();
                    assert!(sum.iter().all(|&value| value == 10.0), "{net:?} round {round}");
                    began.elapsed()
                })
                .collect();
            took.sort_unstable();
            took[N_ROUNDS / 4]
        });
        assert!(took.iter().all(|&quick| quick < TURNS), "{net:?}: {took:?}");
    }
}
