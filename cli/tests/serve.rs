//! `evener bench serve` as a whole, against a real cluster of two workers.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// `evener up` with a model of random weights; it ends, with its workers, when dropped.
struct Up {
    process: Child,
    url: String,
}

impl Up {
    fn start() -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_evener"))
            .args(["up", "--model", "synthetic:llama-tiny:q4_0", "--listen", "127.0.0.1:0"])
            .args(["--workers", "2", "--threads", "1"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It says where it listens once it is ready, or ends.
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let words = |line: String| {
            line.split_whitespace().find_map(|word| word.strip_suffix("/v1").map(str::to_owned))
        };
        let url = lines.map_while(Result::ok).find_map(words).expect("`evener up` got ready");
        Self { process, url }
    }

    fn serve(&self, args: &[&str]) -> Output {
        bench_serve(&self.url, args)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn bench_serve(url: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_evener"))
        .args(["bench", "serve", "--url", url])
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn every_kind_of_load_is_measured_and_written() {
    let up = Up::start();
    let dir = tempfile::tempdir().unwrap();
    let (json, svg) = (dir.path().join("run.json"), dir.path().join("run.svg"));
    for kind in [
        ["--traffic", "random", "--concurrency", "3"],
        ["--traffic", "shared-prefix", "--rate", "50"],
        ["--traffic", "conversation", "--concurrency", "2"],
    ] {
        let mut args = kind.to_vec();
        args.extend(["--requests", "7", "--prompt-tokens", "40", "--prefix-tokens", "20"]);
        args.extend(["--output-tokens", "6", "--turns", "3", "--slo", "e2e=10m"]);
        args.extend(["--json", json.to_str().unwrap(), "--svg", svg.to_str().unwrap()]);
        let output = up.serve(&args);
        assert!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
        let summary = &report["summary"];
        assert_eq!((&summary["requests"], &summary["served"]), (&7.into(), &7.into()));
        assert_eq!(
            (&summary["wrong_length"], &summary["mean_output_tokens"]),
            (&0.into(), &6.0.into())
        );
        assert_eq!(summary["goodput"]["share"], 1.0);
        assert_eq!(summary["e2e_ms"]["n"], 7);
        let figure = |name: &str, part: &str| summary[name][part].as_f64().unwrap();
        assert!(figure("ttft_ms", "p50") > 0.0 && figure("tpot_ms", "p99") > 0.0);
        assert!(figure("e2e_ms", "max") >= figure("ttft_ms", "max"));
        let n_prompt = summary["mean_prompt_tokens"].as_f64().unwrap();
        let expected = if kind[1] == "conversation" { 60.0..130.0 } else { 30.0..50.0 };
        assert!(expected.contains(&n_prompt), "{kind:?}: prompts of {n_prompt} tokens");
        assert!(std::fs::read_to_string(&svg).unwrap().contains("<polyline"));
        let table = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            table.contains("TTFT") && table.contains("goodput under e2e=10m: 100.0 %"),
            "{table}"
        );
        assert!(
            output.stderr.is_empty(),
            "no progress line where there is no terminal: {output:?}"
        );
    }
    // Prompts beside the load are sent, told of and not counted.
    let mut args = vec!["--requests", "4", "--concurrency", "2", "--output-tokens", "40"];
    args.extend(["--prompt-tokens", "40", "--beside-rate", "200", "--beside-tokens", "64"]);
    args.extend(["--json", json.to_str().unwrap()]);
    let output = up.serve(&args);
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["summary"]["served"], 4);
    assert!(report["beside"]["requests"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(report["beside"]["failed"], 0);
    assert!(
        String::from_utf8_lossy(&output.stdout).contains(" prompts of 64 tokens, 200 a second")
    );

    // A schema goes with every request; this model's tokenizer can serve none.
    let output = up.serve(&["--json-schema", r#"{"type": "array"}"#]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("`response_format`") && error.contains("has no end token"), "{error}");

    let output = up.serve(&["--model", "nobody"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("does not serve nobody; it serves "), "{error}");
}

#[test]
fn what_cannot_be_measured_is_refused_in_one_sentence() {
    for (args, expected) in [
        (vec![], "nothing listens there"),
        (vec!["--concurrency", "0"], "at least 1"),
        (vec!["--rate", "0"], "more than 0"),
        (vec!["--beside-rate", "0"], "more than 0"),
        (vec!["--beside-tokens", "0"], "at least 1"),
        (vec!["--traffic", "shared-prefix", "--prefix-tokens", "128"], "leaves nothing"),
    ] {
        let output = bench_serve("http://127.0.0.1:1", &args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        assert!(error.contains(expected) && error.lines().count() == 1, "{args:?}: {error}");
    }
}

#[test]
fn a_schema_that_is_none_is_refused() {
    let cases =
        [("schema.json", "the schema itself is wanted"), ("7", "a JSON schema is an object")];
    for (schema, expected) in cases {
        let output = bench_serve("http://127.0.0.1:1", &["--json-schema", schema]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(expected), "{schema}: {error}");
    }
}
