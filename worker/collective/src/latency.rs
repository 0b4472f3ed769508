//! How long an all-reduce between some ranks takes, by size and kind of link. For `evener bench` and
//! the example; each rank is a thread that spins on a core of its own, or yields where cores are too
//! few.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use crate::{
    AbortHandle, Collective, Error, GroupSpec, Mesh, Options, Peer, ReducePlan, Rendezvous, Tag,
    Transport,
};

/// Bytes of one rank's part: a scalar, the demo model's row, and powers of two up to a prefill.
pub const SIZES: [usize; 8] = [8, 256, 2304, 8 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

/// What carries the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Two threads of one process.
    Local,
    Shm,
    /// Over the loopback device.
    Tcp,
}

impl Link {
    pub const ALL: [Self; 3] = [Self::Local, Self::Shm, Self::Tcp];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
        }
    }
}

/// How long all-reduces of one size took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Latency {
    pub bytes: usize,
    /// Microseconds.
    pub p50: f64,
    pub p99: f64,
}

/// All-reduces of each of [`SIZES`], `n_rounds` each, as rank 0 sees them.
///
/// # Errors
/// The ranks could not connect, or a link failed.
pub fn measure(link: Link, n_ranks: usize, n_rounds: usize) -> Result<Vec<Latency>, Error> {
    let n_cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let options = Options { spin: n_ranks <= n_cores, ..Options::default() };
    let group = match link {
        Link::Local => Mesh::local(n_ranks, 1, &options)?,
        Link::Shm => by_rendezvous(n_ranks, Transport::Shm, &options)?,
        Link::Tcp => by_rendezvous(n_ranks, Transport::Tcp, &options)?,
    };
    thread::scope(|scope| {
        let spawn = |(rank, mesh): (usize, Mesh)| {
            scope.spawn(move || {
                if options.spin {
                    pin_to(rank);
                }
                run(mesh, n_ranks, n_rounds.max(1))
            })
        };
        let ranks: Vec<_> = group.into_iter().enumerate().map(spawn).collect();
        let rows = ranks.into_iter().map(|rank| rank.join().expect("measuring does not panic"));
        let mut rows = rows.collect::<Result<Vec<_>, _>>()?;
        Ok(rows.swap_remove(0))
    })
}

fn by_rendezvous(
    n_ranks: usize,
    transport: Transport,
    options: &Options,
) -> Result<Vec<Mesh>, Error> {
    let bind = |_| Rendezvous::bind((Ipv4Addr::LOCALHOST, 0).into());
    let doors: Vec<Rendezvous> = (0..n_ranks).map(bind).collect::<Result<_, _>>()?;
    let peers: Vec<Peer> = doors
        .iter()
        .map(|door| Peer { address: door.local_addr().to_string(), host_id: "here".into() })
        .collect();
    thread::scope(|scope| {
        let ranks: Vec<_> = doors
            .iter()
            .enumerate()
            .map(|(rank, door)| {
                let peers = peers.clone();
                let spec = GroupSpec { epoch: 1, rank, token: String::new(), peers, transport };
                scope.spawn(move || door.connect(&spec, options, &AbortHandle::new()?))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("connect does not panic")).collect()
    })
}

fn run(mut mesh: Mesh, n_ranks: usize, n_rounds: usize) -> Result<Vec<Latency>, Error> {
    let plan = ReducePlan::any_order(n_ranks);
    let n_warm = n_rounds / 10;
    let mut step = 0;
    let mut rows = Vec::with_capacity(SIZES.len());
    for bytes in SIZES {
        let part = vec![1.0; bytes / 4];
        let mut out = vec![0.0; bytes / 4];
        let mut took: Vec<Duration> = Vec::with_capacity(n_rounds);
        for round in 0..n_rounds + n_warm {
            step += 1;
            let began = Instant::now();
            mesh.all_reduce(Tag { step, op: 0 }, &plan, &part, &mut out)?;
            if round >= n_warm {
                took.push(began.elapsed());
            }
        }
        took.sort_unstable();
        let micros = |at: usize| took[at].as_secs_f64() * 1e6;
        rows.push(Latency { bytes, p50: micros(n_rounds / 2), p99: micros(n_rounds * 99 / 100) });
    }
    Ok(rows)
}

/// Two ranks on one core would measure the scheduler. Not being allowed to is no error: then the
/// scheduler is measured too.
fn pin_to(core: usize) {
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut cores: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: ranks are as few as cores, whose numbers fit a cpu_set_t; CPU_SET checks it, too.
    unsafe { libc::CPU_SET(core, &mut cores) };
    // SAFETY: the kernel reads one live cpu_set_t; 0 is the calling thread.
    unsafe { libc::sched_setaffinity(0, size_of_val(&cores), &cores) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_link_is_measured_at_every_size() {
        for link in Link::ALL {
            let rows = measure(link, 2, 3).expect("ranks of this machine reach each other");
            let sizes: Vec<usize> = rows.iter().map(|row| row.bytes).collect();
            assert_eq!(sizes, SIZES, "{}", link.name());
            assert!(rows.iter().all(|row| row.p50 > 0.0 && row.p99 >= row.p50), "{rows:?}");
        }
    }
}
