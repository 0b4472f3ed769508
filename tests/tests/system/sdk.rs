//! The real OpenAI package against the real cluster: tests/sdk, run by pytest.

use std::path::PathBuf;
use std::time::Duration;

use evener_tests::{Cluster, root};
use tokio::process::Command;

const DEADLINE: Duration = Duration::from_secs(240);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_openai_package_finds_what_it_expects() {
    let python = std::env::var_os("EVENER_SDK_PYTHON")
        .map_or_else(|| root().join(".cache/sdk/python"), PathBuf::from);
    assert!(python.is_file(), "{} is missing; run `make sdk`", python.display());
    let cluster = Cluster::builder().shares("2:1").start().await;
    let mut pytest = Command::new(python);
    pytest
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/sdk"])
        .current_dir(root())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("EVENER_URL", cluster.url())
        .env("EVENER_MODEL", &cluster.model)
        .kill_on_drop(true);
    let output = tokio::time::timeout(DEADLINE, pytest.output()).await;
    let output = output.expect("pytest ends in time").expect("pytest can be started");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains(" passed"), "{said}");
    println!("{said}");
}
