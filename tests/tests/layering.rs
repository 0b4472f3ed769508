//! Who may know whom: reads the sources and keeps ARCHITECTURE.md's map true.
//!
//! It reads `use` lines, paths and attributes as text, comments left out. A rule that the compiler
//! can keep (crate against crate) is checked on the manifests; the rest on the files.

use std::path::{Path, PathBuf};

use evener_tests::root;

/// A source file without its comments, by its path in the repository.
struct Source {
    path: String,
    lines: Vec<String>,
    /// First line of its `#[cfg(test)] mod tests`, if it has one.
    tests_from: usize,
}

fn sources(under: &str) -> Vec<Source> {
    let mut files = Vec::new();
    collect(&root().join(under), &mut files);
    assert!(!files.is_empty(), "{under} has no sources");
    files.sort();
    files.iter().map(|file| read(file)).collect()
}

fn collect(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.expect("a directory can be listed").path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            into.push(path);
        }
    }
}

fn read(file: &Path) -> Source {
    let text = std::fs::read_to_string(file).expect("a source can be read");
    let path = file.strip_prefix(root()).expect("it lies in the repository").display().to_string();
    let lines: Vec<String> = text
        .lines()
        .map(|line| match line.find("//") {
            // Not the two slashes of a URL.
            Some(at) if !line[..at].ends_with(':') => line[..at].to_owned(),
            Some(_) | None => line.to_owned(),
        })
        .collect();
    let tests_from = lines
        .windows(2)
        .position(|two| {
            let next = two[1].trim_start();
            two[0].trim() == "#[cfg(test)]"
                && (next.starts_with("mod tests") || next.starts_with("#["))
        })
        .unwrap_or(lines.len());
    Source { path, lines, tests_from }
}

/// Whether `text` names `word` as a path or an identifier of its own.
fn names(text: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

/// Lines outside tests, outside the `allowed` paths, that name one of `words`.
fn offenders(under: &str, words: &[&str], allowed: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources(under) {
        if allowed.iter().any(|path| source.path.starts_with(path)) {
            continue;
        }
        for (i, line) in source.lines.iter().enumerate().take(source.tests_from) {
            if let Some(word) = words.iter().find(|word| names(line, word)) {
                found.push(format!("{}:{}: {word}: {}", source.path, i + 1, line.trim()));
            }
        }
    }
    found
}

fn assert_only(under: &str, words: &[&str], allowed: &[&str], rule: &str) {
    let found = offenders(under, words, allowed);
    assert!(found.is_empty(), "{rule}\n{}", found.join("\n"));
    for path in allowed {
        assert!(root().join(path).exists(), "the rule `{rule}` names {path}, which is not there");
    }
}

/// Names of our own crates in the `[dependencies]` of a crate.
fn own_dependencies(manifest: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(manifest)).expect("a manifest can be read");
    let mut section = String::new();
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line.to_owned();
        } else if section == "[dependencies]"
            && let Some((name, _)) = line.split_once('=')
            && name.trim().starts_with("evener-")
        {
            found.push(name.trim().to_owned());
        }
    }
    found.sort();
    found
}

#[test]
fn crates_know_only_whom_they_may() {
    for (manifest, allowed) in [
        ("proto/Cargo.toml", vec![]),
        ("telemetry/Cargo.toml", vec![]),
        ("coordinator/Cargo.toml", vec!["evener-proto", "evener-telemetry"]),
        ("worker/kernels/Cargo.toml", vec![]),
        ("worker/collective/Cargo.toml", vec![]),
        (
            "worker/Cargo.toml",
            vec!["evener-collective", "evener-kernels", "evener-proto", "evener-telemetry"],
        ),
        (
            "cli/Cargo.toml",
            vec!["evener-coordinator", "evener-proto", "evener-telemetry", "evener-worker"],
        ),
        ("tests/Cargo.toml", vec![]),
    ] {
        assert_eq!(own_dependencies(manifest), allowed, "{manifest}");
    }
}

#[test]
fn only_http_knows_axum() {
    let words = ["axum", "hyper", "hyper_util", "tower_http"];
    assert_only("coordinator/src", &words, &["coordinator/src/http/"], "only http/ knows axum");
    assert_only("worker/src", &words, &[], "a worker speaks no HTTP");
}

#[test]
fn only_the_border_files_know_etcd() {
    let allowed = ["coordinator/src/cluster/etcd", "worker/src/registration.rs"];
    let paths = ["proto::etcd", "etcd::kv_client", "etcd::watch_client", "etcd::lease_client"];
    for under in ["coordinator/src", "worker/src", "cli/src"] {
        let found: Vec<String> = sources(under)
            .iter()
            .filter(|source| !allowed.iter().any(|path| source.path.starts_with(path)))
            .filter(|source| {
                let text = source.lines[..source.tests_from].join("\n");
                let by_list = text.contains("evener_proto::{") && {
                    let list = text.split("evener_proto::{").nth(1).unwrap_or_default();
                    names(list.split('}').next().unwrap_or_default(), "etcd")
                };
                by_list || paths.iter().any(|path| text.contains(path))
            })
            .map(|source| source.path.clone())
            .collect();
        assert!(found.is_empty(), "only cluster/etcd and registration.rs speak etcd: {found:?}");
    }
}

#[test]
fn only_the_device_side_knows_cuda() {
    let rule = "only the kernels' device side knows the driver's bindings";
    assert_only("worker/kernels/src", &["cudarc"], &["worker/kernels/src/cuda/"], rule);
    for under in ["worker/src", "worker/collective/src", "coordinator/src", "cli/src"] {
        assert_only(under, &["cudarc"], &[], rule);
    }
    // Of the worker, the backend launches kernels; others may only ask what there is.
    let rule = "only backend/cuda uses devices";
    let allowed = ["worker/src/backend/", "worker/src/host.rs"];
    assert_only("worker/src", &["evener_kernels::cuda"], &allowed, rule);
}

#[test]
fn generated_messages_stop_at_the_border_files() {
    for (under, allowed) in [
        (
            "coordinator/src",
            vec![
                "coordinator/src/cluster/embedded_grpc.rs",
                "coordinator/src/cluster/etcd",
                "coordinator/src/cluster/member.rs",
                "coordinator/src/cluster/records.rs",
                "coordinator/src/group/link.rs",
                "coordinator/src/group/stream.rs",
            ],
        ),
        (
            "worker/src",
            vec!["worker/src/registration.rs", "worker/src/report.rs", "worker/src/service"],
        ),
        ("cli/src", vec!["cli/src/bench/engine.rs"]),
    ] {
        let found: Vec<String> = sources(under)
            .iter()
            .filter(|source| !allowed.iter().any(|path| source.path.starts_with(path)))
            .filter(|source| {
                let text = source.lines[..source.tests_from].join("\n");
                ["evener_proto::worker", "evener_proto::registry", "evener_proto::{"]
                    .iter()
                    .any(|path| text.contains(path))
            })
            .map(|source| source.path.clone())
            .collect();
        assert!(found.is_empty(), "generated types leave their border files: {found:?}");
    }
    let rule = "the command line speaks HTTP only, but where it times an engine";
    assert_only("cli/src", &["tonic", "prost"], &["cli/src/bench/engine.rs"], rule);
}

#[test]
fn the_engine_thread_and_below_have_no_async() {
    // The handle is the other end of the engine's channels: it lives on the runtime, not on the
    // engine's thread.
    let rule = "no async in the engine thread or below";
    assert_only("worker/src/engine", &["async", "await"], &["worker/src/engine/handle.rs"], rule);
    for under in ["worker/src/model", "worker/src/backend", "worker/src/checkpoint"] {
        assert_only(under, &["async", "await"], &[], rule);
    }
    let below = ["worker/kernels/src", "worker/collective/src"];
    for under in below {
        assert_only(
            under,
            &["async", "await", "tokio", "futures"],
            &[],
            "no async below the engine",
        );
    }
}

#[test]
fn layers_of_the_worker_look_down_only() {
    let rule = "what is below the session knows no service, session or registry";
    let up = ["crate::service", "crate::session", "crate::registration", "evener_proto"];
    for under in
        ["worker/src/engine", "worker/src/model", "worker/src/backend", "worker/src/checkpoint"]
    {
        let found: Vec<String> = sources(under)
            .iter()
            .filter(|s| up.iter().any(|word| s.lines[..s.tests_from].join("\n").contains(word)))
            .map(|source| source.path.clone())
            .collect();
        assert!(found.is_empty(), "{rule}: {found:?}");
    }
}

#[test]
fn the_request_side_does_not_know_the_cluster_side() {
    let request_side = ["http/", "text/", "generation.rs", "router.rs", "group/", "metrics"];
    let found: Vec<String> = sources("coordinator/src")
        .iter()
        .filter(|source| {
            request_side.iter().any(|p| source.path.starts_with(&format!("coordinator/src/{p}")))
        })
        .filter(|source| source.lines[..source.tests_from].join("\n").contains("crate::cluster"))
        .map(|source| source.path.clone())
        .collect();
    assert!(found.is_empty(), "the request side reads group/handle.rs, not the cluster: {found:?}");
    let words = ["candle_core", "memmap2", "evener_worker"];
    assert_only("coordinator/src", &words, &[], "a coordinator reads no model file");
}

#[test]
fn unsafe_stays_behind_its_fences() {
    let fences = [
        "worker/kernels/",
        "worker/collective/",
        "worker/src/checkpoint/bytes.rs",
        "worker/tests/allocations.rs",
        "cli/src/children.rs",
    ];
    for under in ["proto/src", "telemetry", "coordinator/src", "worker", "cli/src", "tests"] {
        let found = offenders(under, &["unsafe", "unsafe_code"], &fences);
        let found: Vec<&String> =
            found.iter().filter(|line| !line.contains("tests/layering.rs")).collect();
        assert!(found.is_empty(), "unsafe outside its fences: {found:#?}");
    }
}

#[test]
fn every_block_of_unsafe_says_why_it_is_sound() {
    for fence in ["worker/kernels/src", "worker/collective/src", "worker/src/checkpoint", "cli/src"]
    {
        for source in sources(fence) {
            let text =
                std::fs::read_to_string(root().join(&source.path)).expect("it was read before");
            let lines: Vec<&str> = text.lines().collect();
            for (i, line) in source.lines.iter().enumerate() {
                let begins_a_block = line.contains("unsafe {") || line.contains("unsafe impl");
                let near = lines[i.saturating_sub(12)..=i].join("\n");
                assert!(
                    !begins_a_block || near.contains("SAFETY"),
                    "{}:{}: no SAFETY sentence above: {}",
                    source.path,
                    i + 1,
                    line.trim()
                );
            }
        }
    }
}

#[test]
fn every_file_opens_with_what_it_is() {
    for under in [
        "proto/src",
        "telemetry",
        "coordinator/src",
        "worker/src",
        "worker/kernels/src",
        "worker/collective/src",
        "cli/src",
        "tests",
    ] {
        let mut files = Vec::new();
        collect(&root().join(under), &mut files);
        for file in files {
            let text = std::fs::read_to_string(&file).expect("a source can be read");
            let first = text.lines().next().unwrap_or_default();
            assert!(first.starts_with("//! "), "{} opens with {first:?}", file.display());
        }
    }
}
