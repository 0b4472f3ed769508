//! Groups of ranks over each kind of link, one thread a rank, for the suites beside.

#![allow(dead_code, clippy::unwrap_used)]

use evener_collective::{
    AbortHandle, Collective, GroupSpec, Mesh, Options, Peer, Rendezvous, Tag, Transport,
};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

pub const EPOCH: u64 = 11;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    Local,
    Shm,
    Tcp,
    /// Ranks of equal parity share a host: shm among them, tcp between.
    Mixed,
}

pub fn options() -> Options {
    Options { spin: false, ..Options::default() }
}

pub fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

pub fn tag(step: u64) -> Tag {
    Tag { step, op: 1 }
}

/// The spec of each rank of a group whose ranks listen at these addresses.
pub fn specs(net: Net, addresses: &[String]) -> Vec<GroupSpec> {
    let host_of = |rank: usize| match net {
        Net::Local | Net::Shm => "one".to_owned(),
        Net::Tcp => format!("host {rank}"),
        Net::Mixed => format!("host {}", rank % 2),
    };
    let peers: Vec<Peer> = addresses
        .iter()
        .enumerate()
        .map(|(rank, address)| Peer { address: address.clone(), host_id: host_of(rank) })
        .collect();
    (0..peers.len())
        .map(|rank| GroupSpec {
            epoch: EPOCH,
            rank,
            token: "a secret".into(),
            peers: peers.clone(),
            transport: if net == Net::Shm { Transport::Shm } else { Transport::Auto },
        })
        .collect()
}

/// A connected group.
pub fn group(net: Net, world_size: usize, options: &Options) -> Vec<Mesh> {
    if net == Net::Local {
        return Mesh::local(world_size, EPOCH, options).unwrap();
    }
    let doors: Vec<Rendezvous> =
        (0..world_size).map(|_| Rendezvous::bind(loopback()).unwrap()).collect();
    let addresses: Vec<String> = doors.iter().map(|door| door.local_addr().to_string()).collect();
    let ranks: Vec<(Rendezvous, GroupSpec)> =
        doors.into_iter().zip(specs(net, &addresses)).collect();
    on_threads(ranks, |(door, spec)| {
        door.connect(&spec, options, &AbortHandle::new().unwrap()).unwrap()
    })
}

/// Runs `rank` for each, side by side; results in the same order.
pub fn on_threads<T: Send, R: Send>(ranks: Vec<T>, rank: impl Fn(T) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> = ranks.into_iter().map(|one| scope.spawn(move || rank(one))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Waits for a state, with a deadline.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(10), "never came: {what}");
        thread::yield_now();
    }
}

/// The kernel's file on the calling thread, to watch it from another.
pub fn this_thread() -> PathBuf {
    Path::new("/proc").join(fs::read_link("/proc/thread-self").unwrap()).join("stat")
}

/// Waits until that thread sleeps in the kernel.
pub fn until_asleep(thread: &Path) {
    until("a sleeping rank", || {
        let stat = fs::read_to_string(thread).unwrap();
        stat.rsplit(") ").next().unwrap().starts_with('S')
    });
}

/// The kind of link between two ranks.
pub fn kind_between(net: Net, one: usize, other: usize) -> &'static str {
    match net {
        _ if one == other => "self",
        Net::Local => "local",
        Net::Shm => "shm",
        Net::Tcp => "tcp",
        Net::Mixed => {
            if one % 2 == other % 2 {
                "shm"
            } else {
                "tcp"
            }
        }
    }
}

pub fn assert_links(net: Net, mesh: &Mesh) {
    let expected: Vec<&str> =
        (0..mesh.world_size()).map(|peer| kind_between(net, mesh.rank(), peer)).collect();
    assert_eq!(mesh.links(), expected, "{net:?}");
}
