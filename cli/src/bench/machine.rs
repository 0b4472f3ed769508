//! What the machine itself can do: read, multiply, meet another rank; and what single linear
//! layers make of it.

use std::time::Duration;

use evener_worker::measure::{self, Buffer, Format, Isa, Link, Place, Pool, Precision};

use super::report::{AllReduce, Ceilings, Kernel, Machine};

/// All-reduces of each size and link.
const N_ROUNDS: usize = 2000;

/// Rows and columns of the layers that are measured alone: a wide one, one that fits a core's
/// second-level cache, and the demo model's gate and up together.
const FAR_SHAPES: [[usize; 2]; 1] = [[8192, 2048]];
const NEAR_SHAPES: [[usize; 2]; 2] = [[512, 2048], [3072, 512]];
/// Until ranks without work no longer spin.
const REST: Duration = Duration::from_millis(100);
/// Rows of activations.
const MS: [usize; 6] = [1, 4, 8, 16, 32, 512];

/// Bandwidth and peaks of so many threads each.
pub fn measure(n_threads: &[usize], buffer: &Buffer) -> Machine {
    let ceilings = |&n: &usize| {
        eprintln!("Measuring memory and arithmetic with {n} thread(s) ...");
        Ceilings::new(n, measure::read_bandwidth(buffer, n), &measure::peaks(n))
    };
    Machine {
        cpu: cpu_name(),
        n_cores: n_cores(),
        isa: Isa::detect().name(),
        threads: n_threads.iter().map(ceilings).collect(),
    }
}

/// What memory delivers between the runs of a model.
pub struct Memory {
    buffer: Buffer,
    n_threads: usize,
}

impl Memory {
    /// As so many threads see it.
    pub fn new(n_threads: usize) -> Self {
        Self { buffer: Buffer::new(), n_threads }
    }

    /// Bytes per second, once the model's ranks rest.
    pub async fn read_now(&self) -> f64 {
        tokio::time::sleep(REST).await;
        measure::read_bandwidth_now(&self.buffer, self.n_threads)
    }
}

pub fn n_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or(std::env::consts::ARCH).to_owned()
}

/// All-reduces of two ranks over every kind of link.
pub fn all_reduce() -> anyhow::Result<Vec<AllReduce>> {
    eprintln!("Measuring all-reduces of two ranks ...");
    let mut rows = Vec::new();
    for link in Link::ALL {
        for latency in measure::all_reduce(link, 2, N_ROUNDS)? {
            rows.push(AllReduce {
                link: link.name(),
                bytes: latency.bytes,
                p50_us: latency.p50,
                p99_us: latency.p99,
            });
        }
    }
    Ok(rows)
}

/// Linear layers alone, in every format, from caches and from memory.
pub fn kernels(n_threads: usize, buffer: &Buffer, precision: Precision) -> Vec<Kernel> {
    let mut pool = Pool::new(n_threads, n_threads <= n_cores());
    let mut kernels = Vec::new();
    let shapes = FAR_SHAPES.map(|shape| (shape, Place::Far)).into_iter();
    let shapes: Vec<_> = shapes.chain(NEAR_SHAPES.map(|shape| (shape, Place::Near))).collect();
    for format in Format::ALL {
        eprintln!("Measuring linear layers in {} ...", format.name());
        for &(shape, place) in &shapes {
            let figures = measure::linear(&mut pool, buffer, precision, format, shape, &MS, place);
            kernels.extend(figures.into_iter().map(|figure| Kernel {
                format: format.name(),
                rows: figure.case.rows,
                columns: figure.case.columns,
                m: figure.case.m,
                place: if place == Place::Far { "far" } else { "near" },
                n_threads,
                microseconds: figure.seconds * 1e6,
                bytes_per_s: figure.bytes_per_s(),
                ops_per_s: figure.ops_per_s(),
            }));
        }
    }
    kernels
}
