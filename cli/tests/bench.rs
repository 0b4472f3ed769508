//! `evener bench` as a whole: real processes, a model of random weights, JSON and a picture.

#![allow(clippy::unwrap_used)]

use std::process::Command;

use serde_json::Value;

#[test]
fn every_split_of_a_synthetic_model_is_measured_beside_the_ceilings() {
    let dir = tempfile::tempdir().unwrap();
    let svg = dir.path().join("roofline.svg");
    let output = Command::new(env!("CARGO_BIN_EXE_evener"))
        .args(["bench", "--synthetic", "llama-tiny", "--format", "q4_0", "--json", "--svg"])
        .arg(&svg)
        .args(["--split", "1x1,2x1/shm,2x1/tcp", "--concurrency", "1", "--prefill", "32"])
        // Prompts so long that the first sequence would end before the last had begun.
        .args(["--batches", "1,6", "--context", "150", "--steps", "4"])
        .args(["--runs", "1", "--tokens", "4"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["machine"]["threads"][0]["read_best"].as_f64().unwrap() > 0.0);
    assert_eq!(report["all_reduce"].as_array().unwrap().len() % 3, 0);
    let splits = report["models"][0]["splits"].as_array().unwrap();
    for (split, (name, link)) in
        splits.iter().zip([("1x1", "self"), ("2x1/shm", "shm"), ("2x1/tcp", "tcp")])
    {
        assert_eq!(split["split"], name);
        assert_eq!(split["links"].as_array().unwrap().last().unwrap(), link);
        let work = split["work"].as_array().unwrap();
        let kinds: Vec<_> = work.iter().map(|w| (w["what"].as_str().unwrap(), &w["n"])).collect();
        assert_eq!(kinds, [("prefill", &32.into()), ("decode", &1.into()), ("decode", &6.into())]);
        assert!(work.iter().all(|w| w["tok_s"]["median"].as_f64().unwrap() > 0.0), "{work:?}");
        assert_eq!(split["http"][0]["tokens"]["median"], 4.0);
    }
    assert_eq!(splits.len(), 3);
    assert!(std::fs::read_to_string(&svg).unwrap().contains("llama-tiny"));
}
