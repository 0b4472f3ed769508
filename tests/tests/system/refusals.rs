//! `evener up` that cannot: one sentence, a non-zero status, and no process left behind.

use std::path::Path;

use evener_tests::{Process, READY, evener, living_processes_marked, model};

async fn refusal(what: &str, args: &[&str]) -> String {
    let mark = format!("refusal-{}-{}", std::process::id(), what.replace(' ', "-"));
    let mut all = vec!["up", "--listen", "127.0.0.1:0", "--threads", "1"];
    all.extend(args);
    let mut up = Process::start("evener up", Path::new(&evener()), &all, &mark);
    let ended = up.ended(READY).await;
    assert!(!ended.status.success(), "{what}: {ended:?}");
    assert_eq!(living_processes_marked(&mark), Vec::<String>::new(), "{what} left processes");
    let sentences: Vec<&str> =
        ended.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(sentences.len(), 1, "{what} should be one sentence: {}", ended.stderr);
    sentences[0].to_owned()
}

async fn check(what: &str, args: &[&str], expected: &[&str]) {
    let sentence = refusal(what, args).await;
    for part in expected {
        assert!(sentence.contains(part), "{what}: `{part}` is missing in `{sentence}`");
    }
}

#[tokio::test]
async fn impossible_shares_are_refused() {
    let model = model().display().to_string();
    let with = |shares: &[&'static str]| {
        let mut args = vec!["--model", &model];
        args.extend(shares);
        args.into_iter().map(str::to_owned).collect::<Vec<String>>()
    };
    for (what, args, expected) in [
        ("count", with(&["--workers", "3", "--shares", "2:1"]), ["2 workers", "asks for 3"]),
        ("zero", with(&["--shares", "1:0"]), ["share", "at least 1"]),
        ("text", with(&["--shares", "2:x"]), ["`x`", "such as 2:1"]),
        ("nothing left", with(&["--shares", "1:100000"]), ["rank 0", "would hold nothing"]),
        ("too many", with(&["--workers", "65"]), ["65", "at most 64"]),
        ("no worker", with(&["--workers", "0"]), ["no worker", "at least 1"]),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        check(what, &args, &expected).await;
    }
}

#[tokio::test]
async fn a_model_that_is_not_there_is_refused() {
    check("missing file", &["--model", "/nowhere/x.gguf"], &["/nowhere/x.gguf", "does not exist"])
        .await;
    check("unknown name", &["--model", "no-such-model"], &["no-such-model", "give a path"]).await;
}

#[tokio::test]
async fn a_damaged_model_is_refused_with_what_and_where() {
    let whole = std::fs::read(model()).expect("the model can be read");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("damaged.gguf");
    let flipped = |at: usize, to: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        bytes
    };
    let name_of_a_tensor = b"blk.0.attn_q.weight";
    let table = whole
        .windows(name_of_a_tensor.len())
        .position(|bytes| bytes == name_of_a_tensor)
        .expect("the table names its tensors");
    let n_dimensions = table + name_of_a_tensor.len();
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("truncated header", whole[..10].to_vec()),
        ("truncated metadata", whole[..5000].to_vec()),
        ("truncated table", whole[..table + 4].to_vec()),
        ("truncated data", whole[..whole.len() / 2].to_vec()),
        ("wrong magic", flipped(0, b"GGML")),
        ("hostile count", flipped(8, &u64::MAX.to_le_bytes())),
        ("hostile dimensions", flipped(n_dimensions, &u32::MAX.to_le_bytes())),
    ] {
        std::fs::write(&file, bytes).expect("the damaged file can be written");
        let sentence = refusal(what, &["--model", &file.display().to_string()]).await;
        assert!(sentence.contains("damaged.gguf"), "{what}: the file is not named in `{sentence}`");
        let place = ["header", "metadata", "tensor", "magic", "byte", "GGUF", "is empty"];
        assert!(
            place.iter().any(|word| sentence.contains(word)),
            "{what}: no place is named in `{sentence}`"
        );
    }
}

#[tokio::test]
async fn a_port_in_use_is_refused() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("a bound socket has an address").to_string();
    let model = model().display().to_string();
    let mark = format!("refusal-{}-port", std::process::id());
    let args = ["up", "--model", &model, "--listen", &address];
    let ended = Process::start("evener up", Path::new(&evener()), &args, &mark).ended(READY).await;
    assert!(!ended.status.success(), "{ended:?}");
    assert!(ended.stderr.contains(&address), "{ended:?}");
    assert!(ended.stderr.contains("another process"), "{ended:?}");
    assert_eq!(living_processes_marked(&mark), Vec::<String>::new());
}

#[tokio::test]
async fn a_registry_that_is_not_there_is_refused() {
    let model = model().display().to_string();
    let args = ["--model", &model, "--registry", "etcd://127.0.0.1:1"];
    check("no etcd", &args, &["127.0.0.1:1", "embedded registry"]).await;
    let args = ["--model", &model, "--registry", "consul://127.0.0.1:1"];
    let mark = "refusal-registry";
    let up = [&["up"][..], &args].concat();
    let ended = Process::start("evener up", Path::new(&evener()), &up, mark).ended(READY).await;
    assert!(!ended.status.success(), "{ended:?}");
    assert!(ended.stderr.contains("etcd://HOST:PORT"), "{ended:?}");
}

#[tokio::test]
async fn too_little_memory_is_refused() {
    let model = model().display().to_string();
    check(
        "little memory",
        &["--model", &model, "--workers", "2", "--memory", "64MiB"],
        &["w0", "64.0 MiB", "at least", "raise --memory"],
    )
    .await;
}
