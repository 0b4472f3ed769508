//! The binary's command line from outside: help, printed configuration, and where options come
//! from.
//!
//! That this test exists also makes `cargo test` build the binary, which the system tests in
//! `tests/` start.

use std::process::{Command, Output};

fn evener(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_evener"));
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("EVENER_") {
            command.env_remove(key);
        }
    }
    command
        .args(args)
        .envs(environment.iter().copied())
        .output()
        .expect("the binary can be started")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn help_shows_every_verb_and_examples() {
    let help = stdout(&evener(&["--help"], &[]));
    for verb in ["up", "chat", "status", "bench", "plan", "coordinator", "worker"] {
        assert!(help.contains(&format!("\n  {verb} ")), "{verb} is missing in\n{help}");
        let own = evener(&[verb, "--help"], &[]);
        assert!(own.status.success());
        assert!(stdout(&own).contains("Examples:"), "{verb} --help has no examples");
    }
}

#[test]
fn flags_win_over_environment_and_environment_over_the_file() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("evener.toml");
    let file = "[up]\nmodel = \"from-file\"\nshares = \"3:1\"\nthreads = 7\ndrain-timeout = 9\n";
    std::fs::write(&path, file).expect("the file can be written");
    let path = path.display().to_string();
    let args = ["up", "--config", &path, "--print-config", "--threads", "5"];
    let output = evener(&args, &[("EVENER_THREADS", "6"), ("EVENER_DRAIN_TIMEOUT", "8")]);
    let printed = stdout(&output);
    for line in ["model = \"from-file\"", "shares = \"3:1\"", "threads = 5", "drain-timeout = 8"] {
        assert!(printed.contains(line), "{line} is missing in\n{printed}{output:?}");
    }
}

#[test]
fn what_is_printed_can_be_read_again() {
    let verbs: [&[&str]; 5] = [
        &["up", "--model", "m", "--shares", "2:1", "--memory", "1GiB"],
        &["status"],
        &["chat"],
        &["bench", "--synthetic", "llama-1b", "--format", "q4_0,bf16", "--split", "1x2,2x1/tcp"],
        &["bench", "serve", "--rate", "2.5", "--traffic", "shared-prefix", "--slo", "ttft=1s"],
    ];
    for verb in verbs {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("evener.toml");
        let mut args = verb.to_vec();
        args.push("--print-config");
        let first = stdout(&evener(&args, &[]));
        assert!(!first.is_empty(), "{verb:?} printed nothing");
        std::fs::write(&path, &first).expect("the file can be written");
        let path = path.display().to_string();
        let mut args: Vec<&str> =
            verb.iter().copied().take_while(|w| !w.starts_with('-')).collect();
        args.extend(["--config", &path, "--print-config"]);
        let again = evener(&args, &[]);
        assert_eq!(stdout(&again), first, "{again:?}");
    }
}

#[test]
fn refusals_are_one_sentence_and_not_zero() {
    for (args, expected) in [
        (vec!["plan", "--model", "/nowhere.gguf"], "does not exist"),
        (vec!["status", "--url", "http://127.0.0.1:1"], "nothing listens there"),
        (vec!["status", "--url", "https://example.org"], "http:// only"),
        (vec!["worker", "--model", "/nowhere.gguf"], "does not exist"),
        (vec!["up", "--config", "/nowhere.toml"], "cannot be read"),
        (vec!["up", "--model", "synthetic:llama-1b:q3"], "there are f32"),
        (vec!["bench"], "nothing to measure"),
        (vec!["bench", "--model", "/nowhere.gguf"], "does not exist"),
    ] {
        let output = evener(&args, &[]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        assert!(error.starts_with("error: ") && error.contains(expected), "{args:?}: {error}");
    }
}
