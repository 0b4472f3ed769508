//! How ranks find each other, and who is turned away.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Net, loopback, on_threads, options, specs, tag, this_thread, until_asleep};
use evener_collective::{
    AbortHandle, Collective, Error, GroupSpec, Mesh, Options, Rendezvous, Transport,
};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

fn doors(n: usize) -> (Vec<Rendezvous>, Vec<String>) {
    let doors: Vec<Rendezvous> = (0..n).map(|_| Rendezvous::bind(loopback()).unwrap()).collect();
    let addresses = doors.iter().map(|door| door.local_addr().to_string()).collect();
    (doors, addresses)
}

fn connect(door: &Rendezvous, spec: &GroupSpec, options: &Options) -> Result<Mesh, Error> {
    door.connect(spec, options, &AbortHandle::new().unwrap())
}

/// What both ranks of a pair come to if rank 1 sees the group as `change` leaves it.
fn pair(change: impl Fn(&mut GroupSpec)) -> Vec<Result<Mesh, Error>> {
    let (doors, addresses) = doors(2);
    let mut specs = specs(Net::Tcp, &addresses);
    change(&mut specs[1]);
    let options = Options { join_timeout: Duration::from_millis(300), ..options() };
    let ranks: Vec<_> = doors.iter().zip(specs).collect();
    on_threads(ranks, |(door, spec)| connect(door, &spec, &options))
}

#[test]
fn who_does_not_belong_is_told_why() {
    type Change = fn(&mut GroupSpec);
    let cases: [(&str, Change); 3] = [
        ("token", |spec| spec.token = "another".into()),
        ("world size 3", |spec| spec.peers.push(spec.peers[0].clone())),
        ("epoch 10 is over", |spec| spec.epoch -= 1),
    ];
    for (word, change) in cases {
        let mut ends = pair(change);
        match ends.pop().unwrap() {
            Err(Error::Refused { peer: 0, reason, .. }) => {
                assert!(reason.contains(word), "{reason}")
            }
            Err(other) => panic!("{word}: {other}"),
            Ok(_) => panic!("{word}: let in"),
        }
        match ends.pop().unwrap() {
            Err(Error::JoinTimeout { missing, .. }) => assert_eq!(missing, [1]),
            Err(other) => panic!("{word}: {other}"),
            Ok(_) => panic!("{word}: a group of one"),
        }
    }
}

#[test]
fn a_group_that_cannot_be_is_refused_before_anybody_is_dialled() {
    let (doors, addresses) = doors(1);
    let good = specs(Net::Tcp, &addresses).remove(0);
    assert_eq!(connect(&doors[0], &good, &options()).unwrap().links(), ["self"]);
    let mut cases = vec![good.clone(), good.clone(), good];
    cases[0].rank = 1;
    cases[1].peers.clear();
    cases[2].token = "x".repeat(257);
    for spec in cases {
        let error = connect(&doors[0], &spec, &options()).err().unwrap();
        assert!(matches!(error, Error::BadGroup { .. }), "{error}");
    }
}

#[test]
fn an_epoch_that_is_over_cannot_be_asked_for() {
    let (doors, addresses) = doors(1);
    let mut spec = specs(Net::Tcp, &addresses).remove(0);
    connect(&doors[0], &spec, &options()).unwrap();
    let newest = spec.epoch;
    spec.epoch -= 1;
    let error = connect(&doors[0], &spec, &options()).err();
    assert_eq!(error, Some(Error::EpochOver { epoch: newest - 1, newest }));
}

#[test]
fn garbage_closes_its_own_socket_and_nothing_else() {
    let (doors, addresses) = doors(2);
    let mut huge = b"EvHi\x01\x00\x01\x00".to_vec();
    huge.extend(u32::MAX.to_le_bytes());
    let garbage: [&[u8]; 4] =
        [b"GET / HTTP/1.1\r\n\r\n", &[0xff; 4096], &huge, b"EvHi\x01\x00\x07\x00\0\0\0\0"];
    let sockets: Vec<TcpStream> = garbage
        .iter()
        .map(|bytes| {
            let mut socket = TcpStream::connect(&addresses[0]).unwrap();
            socket.write_all(bytes).unwrap();
            socket
        })
        .collect();
    let silent = TcpStream::connect(&addresses[0]).unwrap();
    let ranks: Vec<_> = doors.iter().zip(specs(Net::Tcp, &addresses)).collect();
    on_threads(ranks, |(door, spec)| {
        connect(door, &spec, &options()).unwrap().barrier(tag(1)).unwrap();
    });
    for mut socket in sockets.into_iter().chain([silent]) {
        socket.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
        match socket.read(&mut [0; 64]) {
            Ok(0) => {}
            Ok(n) => panic!("{n} bytes of answer"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
}

#[test]
fn another_version_is_refused_in_words() {
    let (_doors, addresses) = doors(1);
    let mut socket = TcpStream::connect(&addresses[0]).unwrap();
    socket.write_all(b"EvHi\x63\x00\x01\x00\0\0\0\0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap();
    assert!(String::from_utf8_lossy(&answer).contains("version 99"));
}

#[test]
fn who_comes_early_is_kept_until_asked_for() {
    let (doors, addresses) = doors(2);
    let specs = specs(Net::Shm, &addresses);
    let (send, threads) = mpsc::channel();
    thread::scope(|scope| {
        let early = scope.spawn(|| {
            send.send(this_thread()).unwrap();
            let mut mesh = connect(&doors[1], &specs[1], &options()).unwrap();
            mesh.barrier(tag(1)).unwrap();
        });
        until_asleep(&threads.recv().unwrap());
        let mut mesh = connect(&doors[0], &specs[0], &options()).unwrap();
        mesh.barrier(tag(1)).unwrap();
        assert_eq!(mesh.links(), ["self", "shm"]);
        early.join().unwrap();
    });
}

#[test]
fn connecting_can_be_aborted_on_either_side() {
    for rank in [0, 1] {
        let (doors, addresses) = doors(2);
        let specs = specs(Net::Tcp, &addresses);
        let abort = AbortHandle::new().unwrap();
        let (send, threads) = mpsc::channel();
        thread::scope(|scope| {
            let alone = scope.spawn(|| {
                send.send(this_thread()).unwrap();
                doors[rank].connect(&specs[rank], &options(), &abort).err()
            });
            until_asleep(&threads.recv().unwrap());
            let began = Instant::now();
            abort.abort("asked to leave");
            let error = alone.join().unwrap();
            assert_eq!(error, Some(Error::Aborted { reason: "asked to leave".into() }));
            assert!(began.elapsed() < Duration::from_millis(700), "{:?}", began.elapsed());
        });
    }
}

#[test]
fn a_peer_that_never_comes_is_named() {
    let (doors, addresses) = doors(3);
    let options = Options { join_timeout: Duration::from_millis(200), ..options() };
    let mut ranks: Vec<_> = doors.iter().zip(specs(Net::Tcp, &addresses)).collect();
    ranks.pop();
    let errors = on_threads(ranks, |(door, spec)| connect(door, &spec, &options).err());
    for error in errors {
        match error {
            Some(Error::JoinTimeout { missing, .. }) => assert_eq!(missing, [2]),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn ranks_that_disagree_about_shared_memory_use_tcp_unless_it_was_demanded() {
    let of_hosts = |spec: &mut GroupSpec| {
        spec.peers.iter_mut().for_each(|peer| peer.host_id = "one".into());
    };
    for end in pair(of_hosts) {
        assert!(end.unwrap().links().contains(&"tcp"));
    }
    let mut ends = pair(|spec| spec.transport = Transport::Shm);
    assert!(matches!(ends.pop(), Some(Err(Error::NoSharedMemory { peer: 0, .. }))));
}

#[test]
fn no_name_stays_behind_in_shared_memory() {
    let names = || {
        let entries = std::fs::read_dir("/dev/shm").unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("evener-")).collect::<Vec<_>>()
    };
    let before = names();
    let _meshes = common::group(Net::Shm, 4, &options());
    // Other groups may be in the middle of their hello; their names go too.
    common::until("no new name", || names().iter().all(|name| before.contains(name)));
}
