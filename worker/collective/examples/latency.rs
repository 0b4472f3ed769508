//! Prints how long an all-reduce between some ranks takes, by size and kind of link.
//!
//! `cargo run --release -p evener-collective --example latency [rounds] [ranks]`. Each rank is a
//! thread that spins on a core of its own, or yields where there are too few: the figures mean
//! something where the cores are idle.

use evener_collective::{
    AbortHandle, Collective, Error, GroupSpec, Mesh, Options, Peer, ReducePlan, Rendezvous, Tag,
    Transport,
};
use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

const SIZES: [usize; 6] = [256, 2304, 8 << 10, 64 << 10, 256 << 10, 1 << 20]; // bytes

fn main() -> Result<(), Error> {
    let number = |at| std::env::args().nth(at).and_then(|word| word.parse::<usize>().ok());
    let (n_rounds, n_ranks) = (number(1).unwrap_or(2000), number(2).unwrap_or(2));
    let spin = n_ranks <= thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let options = Options { spin, ..Options::default() };
    let groups = [
        ("local", Mesh::local(n_ranks, 1, &options)?),
        ("shm", by_rendezvous(n_ranks, Transport::Shm, &options)?),
        ("tcp", by_rendezvous(n_ranks, Transport::Tcp, &options)?),
    ];
    let wait = if spin { "spinning" } else { "yielding" };
    println!("all-reduce of {n_ranks} ranks, {wait}; microseconds, p50 / p99 of {n_rounds}");
    print!("{:>8}", "bytes");
    groups.iter().for_each(|(name, _)| print!("{name:>20}"));
    println!();
    let columns: Vec<Vec<[f64; 2]>> =
        groups.into_iter().map(|(_, g)| measure(g, n_rounds, spin)).collect::<Result<_, _>>()?;
    for (row, bytes) in SIZES.iter().enumerate() {
        print!("{bytes:>8}");
        for [p50, p99] in columns.iter().map(|column| column[row]) {
            print!("{:>20}", format!("{p50:.1} / {p99:.1}"));
        }
        println!();
    }
    Ok(())
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

/// p50 and p99 of each size, as rank 0 sees them.
fn measure(group: Vec<Mesh>, n_rounds: usize, pin: bool) -> Result<Vec<[f64; 2]>, Error> {
    let plan = ReducePlan::any_order(group.len());
    let run = |mut mesh: Mesh| -> Result<Vec<[f64; 2]>, Error> {
        let mut step = 0;
        let mut rows = Vec::new();
        for bytes in SIZES {
            let part = vec![1.0; bytes / 4];
            let mut out = vec![0.0; bytes / 4];
            let mut took = Vec::with_capacity(n_rounds);
            for round in 0..n_rounds + n_rounds / 10 {
                step += 1;
                let began = Instant::now();
                mesh.all_reduce(Tag { step, op: 0 }, &plan, &part, &mut out)?;
                if round >= n_rounds / 10 {
                    took.push(began.elapsed());
                }
            }
            took.sort_unstable();
            let micros = |took: Option<&Duration>| took.map_or(f64::NAN, |t| t.as_secs_f64() * 1e6);
            rows.push([micros(took.get(n_rounds / 2)), micros(took.get(n_rounds * 99 / 100))]);
        }
        Ok(rows)
    };
    thread::scope(|scope| {
        let spawn = |(core, mesh)| {
            scope.spawn(move || {
                if pin {
                    pin_to(core);
                }
                run(mesh)
            })
        };
        let ranks: Vec<_> = group.into_iter().enumerate().map(spawn).collect();
        let rows = ranks.into_iter().map(|rank| rank.join().expect("measuring does not panic"));
        let mut rows = rows.collect::<Result<Vec<_>, _>>()?;
        Ok(rows.swap_remove(0))
    })
}

/// Two ranks on one core would measure the scheduler.
fn pin_to(core: usize) {
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut cores: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: a rank's number is at most 63, within any cpu_set_t.
    unsafe { libc::CPU_SET(core, &mut cores) };
    // SAFETY: the kernel reads one live cpu_set_t; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&cores), &cores) };
    if result != 0 {
        eprintln!("not pinned to core {core}: {}", std::io::Error::last_os_error());
    }
}
