//! `evener status`: workers, groups and what is missing, from `GET /status`.

use std::io::Write;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::client::Client;
use crate::signals::Signals;
use crate::table::Table;
use crate::values::Bytes;
use crate::view::{Group, View, Worker};

const EXAMPLES: &str = "Examples:
  evener status
  evener status --watch
  evener status --json | jq '.workers[].resident_weight_bytes'";

#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Where the cluster listens.
    #[arg(long, env = "EVENER_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Print the answer of GET /status as it is.
    #[arg(long)]
    json: bool,
    /// Print again every second until Ctrl-C.
    #[arg(long)]
    watch: bool,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    let client = Client::new(&options.url)?;
    if !options.watch {
        return show(&client, options.json, false).await;
    }
    let mut signals = Signals::listen()?;
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            _ = tick.tick() => show(&client, options.json, true).await?,
            () = signals.next() => return Ok(()),
        }
    }
}

async fn show(client: &Client, json: bool, clear: bool) -> anyhow::Result<()> {
    let status = client.status().await?;
    let text = if json {
        format!("{}\n", serde_json::to_string_pretty(&status)?)
    } else {
        let clear = if clear { "\x1b[2J\x1b[H" } else { "" };
        format!("{clear}{}", render(client.url(), &View::read(&status)?))
    };
    // A closed pipe (`| head`) is no error of ours.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

fn render(url: &str, view: &View) -> String {
    let registry = match (view.registry.kind.as_str(), view.registry.healthy) {
        ("", _) => String::new(),
        (kind, true) => format!(", registry {kind}"),
        (kind, false) => format!(", registry {kind} (away)"),
    };
    let mut out = format!("Evener {} at {url}{registry}\n\nWORKERS\n", view.version);
    let mut workers = Table::new(&[
        "id", "device", "state", "rank", "share", "weights", "rss", "running", "waiting", "tok/s",
        "shard",
    ]);
    for worker in &view.workers {
        workers.row(worker_row(view, worker));
    }
    out.push_str(&workers.render("no worker is registered"));
    out.push_str("\nGROUPS\n");
    let mut groups =
        Table::new(&["id", "model", "epoch", "state", "members", "links", "kv blocks"]);
    for group in &view.groups {
        groups.row(group_row(view, group));
    }
    out.push_str(&groups.render("no group has been formed"));
    let judged = |group: &&Group| group.state == "ready" && !group.balance.verdict.is_empty();
    let mut judged = view.groups.iter().filter(judged).peekable();
    if judged.peek().is_some() {
        out.push_str("\nBALANCE (last 30 s)\n");
        for group in judged {
            out.push_str(&format!("  {}: {}\n", group.id, group.balance.verdict));
        }
    }
    if !view.missing.is_empty() {
        out.push_str("\nMISSING\n");
        for sentence in &view.missing {
            out.push_str(&format!("  {sentence}\n"));
        }
    }
    out
}

fn worker_row(view: &View, worker: &Worker) -> Vec<String> {
    let number = |n: Option<u32>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let device = match worker.device.backend.as_str() {
        "" => worker.device.kind.clone(),
        backend => backend.to_owned(),
    };
    let progress = view.member(&worker.id).and_then(|m| m.bytes_done.zip(m.bytes_total));
    let percent = progress.and_then(|(done, total)| (done * 100).checked_div(total));
    let state = match (worker.state.as_str(), percent) {
        (_, _) if worker.draining => "draining".to_owned(),
        ("loading", Some(percent)) => format!("loading {percent} %"),
        (state, _) => state.to_owned(),
    };
    vec![
        worker.id.clone(),
        format!("{device} x{}", worker.device.threads),
        state,
        number(worker.rank),
        number(worker.share),
        Bytes(worker.resident_weight_bytes).to_string(),
        Bytes(worker.rss_bytes).to_string(),
        worker.load.running.to_string(),
        worker.load.waiting.to_string(),
        format!("{:.1}", worker.load.tokens_per_s),
        worker.shard.clone(),
    ]
}

fn group_row(view: &View, group: &Group) -> Vec<String> {
    let members: Vec<&str> = group.members.iter().map(|m| m.worker.as_str()).collect();
    let mut links: Vec<&str> = group
        .members
        .iter()
        .flat_map(|m| m.links.iter().map(String::as_str))
        .filter(|&link| link != "self")
        .collect();
    links.sort_unstable();
    links.dedup();
    let state = match group.reason.as_str() {
        "" => group.state.clone(),
        reason => format!("{} ({reason})", group.state),
    };
    vec![
        group.id.clone(),
        group.model.clone(),
        group.epoch.to_string(),
        state,
        members.join(" "),
        links.join(" "),
        format!("{}/{} {}", view.kv_blocks_used(group), group.kv_blocks, group.kv_format),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Balance;

    #[test]
    fn a_ready_group_has_its_balance_told() {
        let group = |id: &str, state: &str| Group {
            id: id.to_owned(),
            state: state.to_owned(),
            balance: Balance { verdict: "rank 0 is waited for".to_owned(), ..Balance::default() },
            ..Group::default()
        };
        let groups = vec![group("m:0", "ready"), group("m:1", "forming")];
        let text = render("http://x", &View { groups, ..View::default() });
        assert!(text.contains("m:0: rank 0 is waited for"), "{text}");
        assert!(!text.contains("m:1: "), "{text}");
    }

    #[test]
    fn an_empty_cluster_says_so() {
        let view = View { missing: vec!["w1 is away".to_owned()], ..View::default() };
        let text = render("http://x", &view);
        for part in ["no worker is registered", "no group has been formed", "w1 is away"] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }
}
