//! An installed llama-bench, run on the same file in turn with our engine, so that whatever the
//! machine does meanwhile meets both.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

/// Longest wait for one run of it.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Of what it printed, as much as an error shows.
const MAX_SHOWN: usize = 300;

/// Tokens per second of one run of each.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Pair {
    pub ours: Rates,
    pub theirs: Rates,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    pub prefill: f64,
    /// One sequence.
    pub decode: f64,
}

/// A row of `llama-bench -o json`, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Row {
    n_prompt: u64,
    n_gen: u64,
    /// Tokens per second, mean of its repetitions.
    avg_ts: f64,
}

/// Runs it once on `file`: a prompt of `n_prompt` tokens, and `n_gen` generated ones.
///
/// # Errors
/// The program cannot be started, fails, takes too long, or prints something else.
pub async fn run(
    program: &Path,
    file: &Path,
    n_threads: usize,
    n_prompt: usize,
    n_gen: usize,
) -> anyhow::Result<Rates> {
    let name = program.display();
    let child = Command::new(program)
        .arg("-m")
        .arg(file)
        .args(["-t", &n_threads.to_string()])
        .args(["-p", &n_prompt.to_string(), "-n", &n_gen.to_string()])
        .args(["-r", "1", "-o", "json"])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(TIMEOUT, child)
        .await
        .with_context(|| format!("{name} did not end within {} s", TIMEOUT.as_secs()))?
        .with_context(|| format!("{name} cannot be started; give the path of llama-bench"))?;
    if !output.status.success() {
        bail!("{name} failed ({}): {}", output.status, shown(&output.stderr));
    }
    parse(&output.stdout)
        .with_context(|| format!("{name} printed no result: {}", shown(&output.stdout)))
}

/// The last words of a program, as one line.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let skip = line.chars().count().saturating_sub(MAX_SHOWN);
    line.chars().skip(skip).collect()
}

fn parse(json: &[u8]) -> anyhow::Result<Rates> {
    let rows: Vec<Row> = serde_json::from_slice(json)?;
    let rate = |what, is_it: fn(&Row) -> bool| {
        let row = rows.iter().find(|row| is_it(row));
        let rate = row.with_context(|| format!("no row of {what}"))?.avg_ts;
        if rate > 0.0 { Ok(rate) } else { bail!("{what} at {rate} tokens per second") }
    };
    Ok(Rates {
        prefill: rate("a prompt", |row| row.n_prompt > 0 && row.n_gen == 0)?,
        decode: rate("generation", |row| row.n_prompt == 0 && row.n_gen > 0)?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PRINTED: &str = r#"[
      {"build_commit": "x", "n_threads": 2, "n_prompt": 512, "n_gen": 0, "n_depth": 0,
       "avg_ns": 1954136821, "avg_ts": 262.0, "stddev_ts": 0.0, "samples_ts": [262.0]},
      {"build_commit": "x", "n_threads": 2, "n_prompt": 0, "n_gen": 64, "n_depth": 0,
       "avg_ns": 1280000000, "avg_ts": 50.0, "stddev_ts": 0.0, "samples_ts": [50.0]}
    ]"#;

    #[test]
    fn what_llama_bench_prints_is_read() {
        assert_eq!(parse(PRINTED.as_bytes()).unwrap(), Rates { prefill: 262.0, decode: 50.0 });
    }

    #[test]
    fn a_result_that_is_not_whole_is_refused() {
        let no_decode = PRINTED.replace("\"n_gen\": 64", "\"n_gen\": 0");
        assert!(parse(no_decode.as_bytes()).unwrap_err().to_string().contains("generation"));
        let stopped = PRINTED.replace("50.0", "0.0");
        assert!(parse(stopped.as_bytes()).unwrap_err().to_string().contains("0 tokens"));
        for bad in ["", "[]", "{}", "| model | size |"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_program_that_is_missing_or_fails_is_named() {
        let run = async |program: &str| {
            let (program, file) = (Path::new(program), Path::new("x.gguf"));
            format!("{:#}", run(program, file, 1, 1, 1).await.unwrap_err())
        };
        assert!(run("/nowhere/llama-bench").await.contains("give the path of llama-bench"));
        assert!(run("false").await.contains("false failed"));
        assert!(run("true").await.contains("true printed no result"));
    }
}
