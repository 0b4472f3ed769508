//! Every dependency, direct or not, comes from a package registry under a licence that Apache-2.0
//! code may be shipped with.

use std::process::Command;

use evener_tests::root;
use serde_json::Value;

/// SPDX ids, all permissive. `deny.toml` has the same list.
const ALLOWED: [&str; 13] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Whether an SPDX expression can be met by allowed licences alone: one of each OR, all of each
/// AND.
fn is_allowed(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ");
    let tokens: Vec<String> = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let mut at = 0;
    let allowed = any_of(&tokens, &mut at);
    allowed && at == tokens.len()
}

fn any_of(tokens: &[String], at: &mut usize) -> bool {
    let mut allowed = all_of(tokens, at);
    while tokens.get(*at).is_some_and(|token| token == "OR") {
        *at += 1;
        allowed |= all_of(tokens, at);
    }
    allowed
}

fn all_of(tokens: &[String], at: &mut usize) -> bool {
    let mut allowed = one(tokens, at);
    while tokens.get(*at).is_some_and(|token| token == "AND") {
        *at += 1;
        allowed &= one(tokens, at);
    }
    allowed
}

fn one(tokens: &[String], at: &mut usize) -> bool {
    let Some(token) = tokens.get(*at) else { return false };
    *at += 1;
    if token == "(" {
        let allowed = any_of(tokens, at);
        *at += 1;
        return allowed;
    }
    let mut id = token.clone();
    if tokens.get(*at).is_some_and(|token| token == "WITH") {
        id = format!("{id} WITH {}", tokens.get(*at + 1).cloned().unwrap_or_default());
        *at += 2;
    }
    ALLOWED.contains(&id.as_str())
}

#[test]
fn expressions_are_read_as_spdx_means_them() {
    for (expression, allowed) in [
        ("MIT", true),
        ("MIT OR GPL-3.0", true),
        ("MIT AND GPL-3.0", false),
        ("(MIT OR GPL-3.0) AND ISC", true),
        ("Apache-2.0 WITH LLVM-exception OR GPL-2.0", true),
        ("MIT/Apache-2.0", true),
        ("GPL-3.0", false),
        ("", false),
    ] {
        assert_eq!(is_allowed(expression), allowed, "{expression}");
    }
}

#[test]
fn every_dependency_may_be_shipped() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(root())
        .output()
        .expect("cargo can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo speaks JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    assert!(packages.len() > 100, "only {} packages", packages.len());
    let mut refused = Vec::new();
    for package in packages {
        let name = format!("{} {}", package["name"], package["version"]);
        let licence = package["license"].as_str().unwrap_or_default();
        if !is_allowed(licence) {
            refused.push(format!("{name}: licence `{licence}`"));
        }
        // Our own have no source; all others must come from a package registry, none from a
        // repository.
        if package["source"].as_str().is_some_and(|source| !source.starts_with("registry+")) {
            refused.push(format!("{name}: source {}", package["source"]));
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}
