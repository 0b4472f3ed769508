//! Prints how long an all-reduce between two ranks takes, by size and kind of link.
//!
//! `cargo run --release -p evener-collective --example latency [rounds]`. Two threads, each
//! spinning on a core of its own: the figures mean something where cores 0 and 1 are idle.

use evener_collective::Error;
use evener_collective::latency::{Latency, Link, SIZES, measure};

fn main() -> Result<(), Error> {
    let n_rounds = std::env::args().nth(1).and_then(|word| word.parse().ok()).unwrap_or(2000);
    println!("all-reduce of 2 ranks, microseconds, p50 / p99 of {n_rounds}");
    print!("{:>8}", "bytes");
    Link::ALL.iter().for_each(|link| print!("{:>20}", link.name()));
    println!();
    let columns: Vec<Vec<Latency>> =
        Link::ALL.iter().map(|&link| measure(link, n_rounds)).collect::<Result<_, _>>()?;
    for (row, bytes) in SIZES.iter().enumerate() {
        print!("{bytes:>8}");
        for Latency { p50, p99, .. } in columns.iter().map(|column| column[row]) {
            print!("{:>20}", format!("{p50:.1} / {p99:.1}"));
        }
        println!();
    }
    Ok(())
}
