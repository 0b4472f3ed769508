//! What measuring a step costs a rank: clock readings, the collective's figures, six histograms.
//!
//! `cargo run --release -p evener-worker --example timeline_cost`

use std::hint::black_box;
use std::time::{Duration, Instant};

use evener_collective::{Collective, Mesh, Options};
use evener_worker::engine::timeline::{Step, Timeline};

const STEPS: u32 = 1_000_000;

fn main() -> Result<(), evener_collective::Error> {
    let mut mesh = Mesh::local(1, 1, &Options::default())?.remove(0);
    let timeline = Timeline::default();
    let mut ended = Instant::now();
    let started = Instant::now();
    for step in 0..STEPS {
        black_box(mesh.take_stats());
        let began = Instant::now();
        let stats = black_box(mesh.take_stats());
        let now = Instant::now();
        let whole = Duration::from_micros(u64::from(step % 10_000));
        timeline.step(&black_box(Step {
            idle: began - ended,
            whole,
            waited: whole / 3,
            transfer: whole / 5 + stats.spent,
            bytes_sent: stats.bytes_sent,
            bytes_received: stats.bytes_received,
            n_tokens: 1,
        }));
        ended = now;
    }
    let each = started.elapsed().as_nanos() / u128::from(STEPS);
    println!("{each} ns a step, over {STEPS} steps");
    assert_eq!(timeline.read(Instant::now()).n_tokens, u64::from(STEPS));
    Ok(())
}
