//! The report as text for people, within a hundred columns.

use clap::ValueEnum;
use clap::builder::PossibleValue;

use super::llama_cpp::{Pair, Rates};
use super::report::{AllReduce, Ceilings, Kernel, Laid, Machine, Model, Report, Settings};
use crate::table::Table;
use crate::values::Bytes;

/// The whole report.
pub fn render(report: &Report) -> String {
    let mut out = machine(&report.machine);
    if !report.all_reduce.is_empty() {
        out += &all_reduce(&report.all_reduce);
    }
    if !report.kernels.is_empty() {
        out += &kernels(&report.kernels);
    }
    if !report.models.is_empty() {
        out += &settings(report.settings);
    }
    report.models.iter().for_each(|one| out += &model(one));
    out
}

fn giga(rate: f64) -> String {
    format!("{:.1}", rate / 1e9)
}

fn tera(rate: f64) -> String {
    format!("{:.2}", rate / 1e12)
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

fn settings(settings: Settings) -> String {
    let Settings { kv, activations, context, runs } = settings;
    let name =
        |value: Option<PossibleValue>| value.map_or(String::new(), |v| v.get_name().to_owned());
    let (kv, activations) = (name(kv.to_possible_value()), name(activations.to_possible_value()));
    format!(
        "\nModels: KV cache in {kv}, activations in {activations}, decoding after {context} positions, \
         runs a figure: {runs}\n"
    )
}

fn machine(machine: &Machine) -> String {
    let Machine { cpu, n_cores, isa, threads } = machine;
    let mut out = format!("{cpu}, {n_cores} cores, kernels for {isa}\n\n");
    out += "Ceilings: memory read in GB/s, arithmetic in TOPS\n";
    let names: Vec<String> = threads.iter().map(|one| format!("{} thr.", one.n_threads)).collect();
    let mut header = vec!["", "of"];
    header.extend(names.iter().map(String::as_str));
    let mut table = Table::new(&header);
    let mut row = |kind: &str, what: &str, cell: &dyn Fn(&Ceilings) -> String| {
        let mut cells = vec![kind.to_owned(), what.to_owned()];
        cells.extend(threads.iter().map(cell));
        table.row(cells);
    };
    row("memory", "best", &|one| giga(one.read_best));
    row("", "median", &|one| giga(one.read_median));
    let instructions = threads.first().map(|one| one.peaks.as_slice()).unwrap_or_default();
    for (i, peak) in instructions.iter().enumerate() {
        row(peak.kind, peak.instruction, &|one| {
            one.peaks.get(i).map_or("-".to_owned(), |peak| tera(peak.ops_per_s))
        });
    }
    out + &table.render("nothing was measured")
}

fn all_reduce(rows: &[AllReduce]) -> String {
    let mut links: Vec<&str> = rows.iter().map(|row| row.link).collect();
    links.dedup();
    let mut header = vec!["bytes"];
    header.extend(&links);
    let mut table = Table::new(&header);
    for row in rows.iter().filter(|row| row.link == links[0]) {
        let of = |link: &&str| {
            let same = rows.iter().find(|r| r.link == *link && r.bytes == row.bytes);
            same.map_or("-".to_owned(), |r| format!("{:.1} / {:.1}", r.p50_us, r.p99_us))
        };
        let mut cells = vec![row.bytes.to_string()];
        cells.extend(links.iter().map(of));
        table.row(cells);
    }
    format!("\nAll-reduce of two ranks, microseconds, p50 / p99\n{}", table.render(""))
}

fn kernels(kernels: &[Kernel]) -> String {
    let n_threads = kernels[0].n_threads;
    let mut out =
        format!("\nOne linear layer alone, {n_threads} thread(s): GB/s of weights, TOPS\n");
    let mut shapes: Vec<_> = kernels.iter().map(|k| (k.place, k.rows, k.columns)).collect();
    shapes.sort_unstable();
    shapes.dedup();
    for (place, rows, columns) in shapes {
        let of_shape = |k: &&Kernel| (k.place, k.rows, k.columns) == (place, rows, columns);
        let here: Vec<&Kernel> = kernels.iter().filter(of_shape).collect();
        let mut ms: Vec<usize> = here.iter().map(|k| k.m).collect();
        ms.sort_unstable();
        ms.dedup();
        let heads: Vec<String> = ms.iter().map(|m| format!("{m} rows")).collect();
        let mut header = vec!["format"];
        header.extend(heads.iter().map(String::as_str));
        let mut table = Table::new(&header);
        let mut formats: Vec<&str> = here.iter().map(|k| k.format).collect();
        formats.dedup();
        for format in formats {
            let mut cells = vec![format.to_owned()];
            for &m in &ms {
                let kernel = here.iter().find(|k| k.format == format && k.m == m);
                cells.push(kernel.map_or("-".to_owned(), |k| {
                    format!("{} {}", giga(k.bytes_per_s), tera(k.ops_per_s))
                }));
            }
            table.row(cells);
        }
        let from = if place == "far" { "from memory" } else { "from caches" };
        out += &format!("  {rows} x {columns}, {from}\n{}", table.render(""));
    }
    out
}

fn model(model: &Model) -> String {
    let mut out = format!(
        "\n{} ({}): a step reads {}, {:.2} billion weights\n",
        model.model,
        model.quantization,
        Bytes(model.step_bytes),
        model.weights as f64 / 1e9
    );
    if let Some(note) = &model.note {
        out += &format!("  {note}\n");
    }
    for laid in &model.splits {
        out += &format!(
            "  {}: {}, ready after {:.1} s ({} GB/s of weights)",
            laid.split,
            laid.backend,
            laid.ready_s,
            giga(laid.resident_weight_bytes as f64 / laid.ready_s)
        );
        if let Some(ms) = laid.load_ms {
            let rate = laid.resident_weight_bytes as f64 / (f64::from(ms) / 1e3);
            out += &format!(", loaded in {ms} ms ({})", giga(rate));
        }
        out.push('\n');
    }
    out += &work(&model.splits);
    for laid in &model.splits {
        out += &http(laid);
        out += &pairs(laid);
    }
    out
}

fn work(splits: &[Laid]) -> String {
    let header =
        ["split", "work", "tok/s", "TOPS", "GB/s", "memory GB/s", "of ceiling", "bound by"];
    let mut table = Table::new(&header);
    for laid in splits {
        for work in &laid.work {
            table.row(vec![
                laid.split.clone(),
                format!("{} {}", work.what, work.n),
                work.tok_s.show(),
                tera(work.ops_per_s),
                giga(work.bytes_per_s),
                giga(work.read_bytes_per_s),
                percent(work.share),
                work.bound.to_owned(),
            ]);
        }
    }
    table.render("nothing was measured")
}

fn http(laid: &Laid) -> String {
    if laid.http.is_empty() {
        return String::new();
    }
    let header = ["streams", "prompt", "tokens", "first token ms", "decode tok/s"];
    let mut table = Table::new(&header);
    for streams in &laid.http {
        table.row(vec![
            streams.concurrency.to_string(),
            format!("{:.0}", streams.prompt_tokens.median),
            format!("{:.0}", streams.tokens.median),
            streams.time_to_first_token_ms.show(),
            streams.decode_tok_s.show(),
        ]);
    }
    format!("  {}, through HTTP\n{}", laid.split, table.render(""))
}

fn pairs(laid: &Laid) -> String {
    if laid.llama_cpp.is_empty() {
        return String::new();
    }
    let mut table =
        Table::new(&["pair", "prefill", "llama.cpp", "ratio", "decode", "llama.cpp", "ratio"]);
    for (i, Pair { ours, theirs }) in laid.llama_cpp.iter().enumerate() {
        let mut cells = vec![(i + 1).to_string()];
        for (ours, theirs) in [(ours.prefill, theirs.prefill), (ours.decode, theirs.decode)] {
            cells.push(format!("{ours:.1}"));
            cells.push(format!("{theirs:.1}"));
            cells.push(format!("{:.2}", ours / theirs));
        }
        table.row(cells);
    }
    let median = |rate: fn(&Rates) -> f64| {
        let mut ratios: Vec<f64> =
            laid.llama_cpp.iter().map(|pair| rate(&pair.ours) / rate(&pair.theirs)).collect();
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    };
    format!(
        "  {}, in turn with llama-bench (tok/s); median ratios: prefill {:.2}, decode {:.2}\n{}",
        laid.split,
        median(|rates| rates.prefill),
        median(|rates| rates.decode),
        table.render("")
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::report::tests::ceilings;
    use super::super::report::{Spread, Work};
    use super::*;
    use crate::values::{Activations, Kv};

    /// A report with something in every part.
    pub(in super::super) fn report() -> Report {
        let work = |what, n, tok_s| Work {
            what,
            n,
            tok_s: Spread { median: tok_s, min: tok_s - 1.0, max: tok_s + 1.0 },
            ops_per_s: 2e9 * tok_s,
            bytes_per_s: 6e8 * tok_s / n as f64,
            read_bytes_per_s: 6e10,
            ceiling_tok_s: 2.0 * tok_s,
            share: 0.5,
            bound: "memory",
        };
        let rates = |prefill, decode| Rates { prefill, decode };
        let laid = Laid {
            split: "2x1/shm".to_owned(),
            n_ranks: 2,
            threads_per_rank: 1,
            backend: "cpu avx512-vnni".to_owned(),
            links: vec!["self".to_owned(), "shm".to_owned()],
            resident_weight_bytes: 600_000_000,
            ready_s: 0.6,
            load_ms: Some(200),
            work: vec![work("prefill", 512, 512.0), work("decode", 1, 50.0)],
            http: Vec::new(),
            llama_cpp: vec![
                Pair { ours: rates(500.0, 60.0), theirs: rates(250.0, 40.0) },
                Pair { ours: rates(520.0, 61.0), theirs: rates(200.0, 40.0) },
                Pair { ours: rates(510.0, 62.0), theirs: rates(100.0, 31.0) },
            ],
        };
        let kernel = |format, place, m| Kernel {
            format,
            rows: 8192,
            columns: 2048,
            m,
            place,
            n_threads: 2,
            microseconds: 10.0,
            bytes_per_s: 5e10,
            ops_per_s: 1e12,
        };
        Report {
            version: "0",
            settings: Settings {
                kv: Kv::F16,
                activations: Activations::Int8,
                context: 512,
                runs: 3,
            },
            machine: Machine {
                cpu: "a processor".to_owned(),
                n_cores: 2,
                isa: "portable",
                threads: vec![ceilings()],
            },
            all_reduce: ["local", "shm"]
                .map(|link| AllReduce { link, bytes: 8192, p50_us: 2.5, p99_us: 9.0 })
                .into(),
            kernels: vec![kernel("Q4_0", "far", 1), kernel("Q4_0", "far", 512)],
            models: vec![Model {
                model: "synthetic:llama-1b:q4_0".to_owned(),
                quantization: "Q4_0".to_owned(),
                note: Some("3 of 16 layers".to_owned()),
                step_bytes: 600_000_000,
                weights: 1_000_000_000,
                splits: vec![laid],
            }],
        }
    }

    #[test]
    fn everything_measured_stands_in_the_text_within_a_hundred_columns() {
        let text = render(&report());
        for expected in [
            "a processor, 2 cores",
            "int8    vpdpbusd",
            "2.5 / 9.0",
            "50.0 1.00",
            "3 of 16 layers",
            "ready after 0.6 s (1.0 GB/s of weights), loaded in 200 ms (3.0)",
            "prefill 512",
            "512.0 (511.0 to 513.0)",
            "50 %",
            "median ratios: prefill 2.60, decode 1.52",
        ] {
            assert!(text.contains(expected), "{expected} is missing in\n{text}");
        }
        let longest = text.lines().map(|line| line.chars().count()).max();
        assert!(longest <= Some(100), "{longest:?}\n{text}");
    }
}
