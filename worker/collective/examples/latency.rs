//! Prints how long an all-reduce between some ranks takes, by size and kind of link.
//!
//! `cargo run --release -p evener-collective --example latency [rounds] [ranks]`. Each rank is a
//! thread that spins on a core of its own, or yields where there are too few: the figures mean
//! something where the cores are idle.

use evener_collective::Error;
use evener_collective::latency::{Latency, Link, SIZES, measure};

fn main() -> Result<(), Error> {
    let number = |at| std::env::args().nth(at).and_then(|word| word.parse::<usize>().ok());
    let (n_rounds, n_ranks) = (number(1).unwrap_or(2000), number(2).unwrap_or(2));
    println!("all-reduce of {n_ranks} ranks, microseconds, p50 / p99 of {n_rounds}");
    print!("{:>8}", "bytes");
    Link::ALL.iter().for_each(|link| print!("{:>20}", link.name()));
    println!();
    let columns: Vec<Vec<Latency>> =
        Link::ALL.iter().map(|&link| measure(link, n_ranks, n_rounds)).collect::<Result<_, _>>()?;
    for (row, bytes) in SIZES.iter().enumerate() {
        print!("{bytes:>8}");
        for Latency { p50, p99, .. } in columns.iter().map(|column| column[row]) {
            print!("{:>20}", format!("{p50:.1} / {p99:.1}"));
        }
        println!();
    }
    Ok(())
}
