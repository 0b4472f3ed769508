//! A rank that is another process, killed with SIGKILL: its peers hear of it at once.
//!
//! The test binary starts itself again as that rank: the same test, told so by its environment.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Net, loopback, options, specs, tag, this_thread, until, until_asleep};
use evener_collective::{
    AbortHandle, Collective, Error, GroupSpec, Mesh, Options, ReducePlan, Rendezvous,
};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const ADDRESSES: &str = "EVENER_TEST_RANK_ADDRESSES";
const WITHIN: Duration = Duration::from_millis(200);
const IDLE_STEP: u64 = 300;

#[test]
fn a_killed_rank_is_noticed_over_shm() {
    a_killed_rank_is_noticed(Net::Shm, "a_killed_rank_is_noticed_over_shm");
}

#[test]
fn a_killed_rank_is_noticed_over_tcp() {
    a_killed_rank_is_noticed(Net::Tcp, "a_killed_rank_is_noticed_over_tcp");
}

/// Rank 2 is the one to be killed: while all reduce, and while its peers sleep.
fn a_killed_rank_is_noticed(net: Net, test: &str) {
    if let Ok(addresses) = std::env::var(ADDRESSES) {
        let mut addresses: Vec<String> = addresses.split(',').map(str::to_owned).collect();
        let is_idle = addresses.pop().unwrap() == "idle";
        return be_rank_2(&specs(net, &addresses)[2], is_idle);
    }
    for is_idle in [false, true] {
        let doors = [(); 2].map(|()| Rendezvous::bind(loopback()).unwrap());
        let mut addresses: Vec<String> =
            doors.iter().map(|door| door.local_addr().to_string()).collect();
        addresses.push("127.0.0.1:1".into()); // nobody dials the highest rank
        let mode = if is_idle { "idle" } else { "busy" };
        let rank_2 = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact"])
            .env(ADDRESSES, format!("{},{mode}", addresses.join(",")))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        kill_beside_work(Killed(rank_2), &doors, &specs(net, &addresses), is_idle);
    }
}

/// Killed and waited for, whatever becomes of the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connect(door: &Rendezvous, spec: &GroupSpec) -> Mesh {
    let options = Options { step_timeout: Duration::from_secs(8), ..options() };
    door.connect(spec, &options, &AbortHandle::new().unwrap()).unwrap()
}

/// Reduces until the end, in idle mode only for a while.
fn reduce(mesh: &mut Mesh, is_idle: bool, n_done: &AtomicU64) -> Result<(), Error> {
    let plan = ReducePlan::any_order(3);
    let mut out = vec![0.0; 2000];
    let mut step = 0;
    while !is_idle || step < IDLE_STEP {
        mesh.all_reduce(tag(step), &plan, &vec![1.0; 2000], &mut out)?;
        assert_eq!(out, [3.0; 2000]);
        step += 1;
        n_done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn be_rank_2(spec: &GroupSpec, is_idle: bool) {
    let mut mesh = connect(&Rendezvous::bind(loopback()).unwrap(), spec);
    if reduce(&mut mesh, is_idle, &AtomicU64::new(0)).is_ok() {
        // As its peers do, so that a parent that dies ends this process too.
        let _ = mesh.broadcast(tag(IDLE_STEP), 0, &mut Vec::new(), Duration::from_secs(30));
    }
}

fn kill_beside_work(
    mut rank_2: Killed,
    doors: &[Rendezvous; 2],
    specs: &[GroupSpec],
    is_idle: bool,
) {
    let n_done = AtomicU64::new(0);
    let (send, threads) = mpsc::channel();
    let (killed_at, ends) = thread::scope(|scope| {
        let ranks: Vec<_> = doors
            .iter()
            .zip(specs)
            .map(|(door, spec)| {
                let (send, n_done) = (send.clone(), &n_done);
                scope.spawn(move || {
                    let mut mesh = connect(door, spec);
                    let result = reduce(&mut mesh, is_idle, n_done).and_then(|()| {
                        send.send(this_thread()).unwrap();
                        let wait = Duration::from_secs(30);
                        mesh.broadcast(tag(IDLE_STEP), 2, &mut Vec::new(), wait)
                    });
                    (result.unwrap_err(), Instant::now())
                })
            })
            .collect();
        until("a working group", || n_done.load(Ordering::Relaxed) >= 2 * IDLE_STEP);
        if is_idle {
            let sleepers = [threads.recv().unwrap(), threads.recv().unwrap()];
            sleepers.iter().for_each(|thread| until_asleep(thread));
        }
        let killed_at = Instant::now();
        rank_2.0.kill().unwrap();
        (killed_at, ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>())
    });
    for (error, at) in ends {
        let took = at.saturating_duration_since(killed_at);
        println!("{took:?}: {error}");
        assert!(matches!(error, Error::PeerLost { .. }), "{error}");
        assert!(took < WITHIN, "{took:?}");
    }
}
