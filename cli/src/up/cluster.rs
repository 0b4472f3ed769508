//! The children of one `evener up`: start them all, wait until they serve, restart what dies, stop
//! them in order.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{anyhow, bail};
use evener_proto::ids::ModelName;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::Shape;
use super::preflight::Plan;
use super::progress::Progress;
use crate::children::{self, Child, Exit, Spec};
use crate::client::Client;
use crate::signals::Signals;
use crate::values::{self, Cores};
use crate::view::View;

/// How often readiness and progress are asked for while starting.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// First pause before a dead child is started again; it doubles with each death.
const FIRST_RESTART_DELAY: Duration = Duration::from_millis(200);
/// Deaths of one child that are forgiven within [`RESTART_WINDOW`].
const MAX_RESTARTS: usize = 5;
const RESTART_WINDOW: Duration = Duration::from_secs(600);
/// What a child may take beyond the drain timeout to end by itself, and after SIGKILL.
const END_GRACE: Duration = Duration::from_secs(5);

/// How a start ended, when nothing failed.
pub enum Started {
    Ready(Cluster),
    /// A signal came first; nothing runs any more.
    Interrupted,
}

/// A running cluster. Dropping it kills its processes.
pub struct Cluster {
    pub model: ModelName,
    pub client: Client,
    /// The coordinator first, then workers by rank.
    members: Vec<Member>,
    exits: mpsc::Receiver<Exit>,
    report: mpsc::Sender<Exit>,
    log_dir: PathBuf,
    drain_timeout: Duration,
}

struct Member {
    spec: Spec,
    state: State,
    deaths: Vec<Instant>,
}

enum State {
    Running(Child),
    /// Ended; to be started again then.
    Dead {
        restart_at: Instant,
    },
    Stopped,
}

impl Cluster {
    /// Starts everything and waits until the model can be asked.
    ///
    /// # Errors
    /// A child that ended, or the start timeout; every process has ended by then.
    pub async fn start(
        plan: &Plan,
        log: &str,
        signals: &mut Signals,
        progress: &mut Progress,
    ) -> anyhow::Result<Started> {
        let log_dir = children::log_dir(plan.shape.log_dir.as_deref())?;
        let (report, exits) = mpsc::channel(16);
        let mut cluster = Self {
            model: plan.name.clone(),
            client: Client::new(&format!("http://{}", reachable(plan)))?,
            members: Vec::new(),
            exits,
            report,
            log_dir,
            drain_timeout: plan.shape.drain_timeout(),
        };
        let waiting = async {
            cluster.spawn_all(plan, log)?;
            cluster.until_ready(plan, progress).await
        };
        let outcome = tokio::select! {
            outcome = waiting => outcome.map(|()| true),
            () = signals.next() => Ok(false),
        };
        match outcome {
            Ok(true) => Ok(Started::Ready(cluster)),
            Ok(false) => {
                progress.clear();
                cluster.stop(signals).await?;
                Ok(Started::Interrupted)
            }
            Err(error) => {
                progress.clear();
                cluster.drain_timeout = Duration::ZERO;
                // The first failure is the one to report.
                let _ = cluster.stop(signals).await;
                Err(error)
            }
        }
    }

    fn spawn_all(&mut self, plan: &Plan, log: &str) -> anyhow::Result<()> {
        for spec in specs(plan, log, &self.log_dir) {
            let child = children::spawn(&spec, self.report.clone())?;
            self.members.push(Member { spec, state: State::Running(child), deaths: Vec::new() });
        }
        Ok(())
    }

    async fn until_ready(&mut self, plan: &Plan, progress: &mut Progress) -> anyhow::Result<()> {
        let timeout = plan.shape.start_timeout();
        let deadline = Instant::now() + timeout;
        let mut poll = tokio::time::interval(POLL_INTERVAL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut missing = "the coordinator does not answer".to_owned();
        loop {
            tokio::select! {
                exit = self.exits.recv() => {
                    let exit = exit.ok_or_else(|| anyhow!("no child can be heard any more"))?;
                    bail!(
                        "{} ended while starting ({}): {}; its log is {}",
                        exit.name,
                        children::describe(&exit.status),
                        exit.last_words,
                        self.log_dir.join(format!("{}.log", exit.name)).display()
                    );
                }
                _ = poll.tick() => {}
                () = tokio::time::sleep_until(deadline) => bail!(
                    "the cluster was not ready within {} s: {missing}; logs are in {}; \
                     --start-timeout allows more",
                    timeout.as_secs(),
                    self.log_dir.display()
                ),
            }
            // Until the coordinator listens there is nothing to see.
            let Ok(status) = self.client.status().await else { continue };
            progress.update(&status);
            let view = View::read(&status)?;
            if view.ready && self.client.ready().await?.is_ok() {
                return Ok(());
            }
            if !view.missing.is_empty() {
                missing = view.missing.join("; ");
            }
        }
    }

    /// Waits for the next death or the next due restart, and acts on it. Cancel safe.
    ///
    /// # Errors
    /// A child that died too often.
    pub async fn supervise(&mut self) -> anyhow::Result<()> {
        let due = self.members.iter().filter_map(Member::restart_at).min();
        tokio::select! {
            exit = self.exits.recv() => match exit {
                Some(exit) => self.bury(&exit),
                None => bail!("no child can be heard any more"),
            },
            () = sleep_until(due) => self.restart_due(),
        }
    }

    fn bury(&mut self, exit: &Exit) -> anyhow::Result<()> {
        let now = Instant::now();
        let log_dir = self.log_dir.clone();
        let Some(member) = self.members.iter_mut().find(|m| m.spec.name == exit.name) else {
            return Ok(());
        };
        member.deaths.retain(|&death| now.duration_since(death) < RESTART_WINDOW);
        member.deaths.push(now);
        let (name, how) = (&exit.name, children::describe(&exit.status));
        let nth = member.deaths.len();
        if nth > MAX_RESTARTS {
            bail!(
                "{name} ended {nth} times within {} minutes, last with {how}: {}; logs are in {}",
                RESTART_WINDOW.as_secs() / 60,
                exit.last_words,
                log_dir.display()
            );
        }
        let delay = FIRST_RESTART_DELAY * (1 << (nth - 1));
        eprintln!(
            "{name} ended ({how}); starting it again in {delay:.1?} ({nth} of {MAX_RESTARTS})"
        );
        member.state = State::Dead { restart_at: now + delay };
        Ok(())
    }

    fn restart_due(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        for member in &mut self.members {
            if member.restart_at().is_some_and(|at| at <= now) {
                let child = children::spawn(&member.spec, self.report.clone())?;
                member.state = State::Running(child);
            }
        }
        Ok(())
    }

    /// Drains: first the coordinator, so that no request is cut, then the workers. A signal kills
    /// what is left.
    ///
    /// # Errors
    /// A process that had to be killed or ended with an error.
    pub async fn stop(&mut self, signals: &mut Signals) -> anyhow::Result<()> {
        let n_coordinators = self.members.len().min(1);
        for member in &self.members {
            // Workers will find the registry gone; that is what was asked for.
            if let State::Running(child) = &member.state {
                child.hush();
            }
        }
        let (coordinator, workers) = self.members.split_at_mut(n_coordinators);
        let mut unclean = Vec::new();
        for phase in [coordinator, workers] {
            for member in phase.iter_mut() {
                match &member.state {
                    State::Running(child) => child.terminate(),
                    State::Dead { .. } => member.state = State::Stopped,
                    State::Stopped => {}
                }
            }
            let mut deadline = Instant::now() + self.drain_timeout + END_GRACE;
            let mut killed = false;
            while phase.iter().any(|m| matches!(m.state, State::Running(_))) {
                tokio::select! {
                    Some(exit) = self.exits.recv() => {
                        if let Some(member) = phase.iter_mut().find(|m| m.spec.name == exit.name) {
                            member.state = State::Stopped;
                        }
                        if !exit.status.as_ref().is_ok_and(std::process::ExitStatus::success) {
                            let how = children::describe(&exit.status);
                            unclean.push(format!("{} ended with {how}", exit.name));
                        }
                    }
                    () = signals.next(), if !killed => {
                        killed = true;
                        kill(phase);
                    }
                    () = tokio::time::sleep_until(deadline) => {
                        if killed {
                            bail!("a process did not end after SIGKILL");
                        }
                        killed = true;
                        kill(phase);
                        deadline = Instant::now() + END_GRACE;
                    }
                }
            }
        }
        if unclean.is_empty() {
            return Ok(());
        }
        bail!(
            "stopped, but not cleanly: {}; logs are in {}",
            unclean.join(", "),
            self.log_dir.display()
        )
    }
}

impl Member {
    fn restart_at(&self) -> Option<Instant> {
        match self.state {
            State::Dead { restart_at } => Some(restart_at),
            State::Running(_) | State::Stopped => None,
        }
    }
}

fn kill(members: &[Member]) {
    for member in members {
        if let State::Running(child) = &member.state {
            child.kill();
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The HTTP address as this machine reaches it.
fn reachable(plan: &Plan) -> std::net::SocketAddr {
    let mut address = plan.http.address;
    if address.ip().is_unspecified() {
        let v4 = address.is_ipv4();
        address.set_ip(if v4 {
            std::net::Ipv4Addr::LOCALHOST.into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    address
}

/// The command lines of the coordinator and of each worker.
fn specs(plan: &Plan, log: &str, log_dir: &Path) -> Vec<Spec> {
    let shape = &plan.shape;
    let spec = |name: String, args: Vec<OsString>| Spec {
        log: log_dir.join(format!("{name}.log")),
        name,
        args,
        verbose: shape.verbose,
    };
    let shares: Vec<String> = plan.shares.iter().map(u32::to_string).collect();
    let drain = shape.drain_timeout.to_string();
    let registry = shape.registry.to_string();
    let mut coordinator: Vec<OsString> = args(&[
        ("--log", log),
        ("--listen", &plan.http.address.to_string()),
        ("--registry", &registry),
        ("--deploy", plan.name.as_str()),
        ("--group-size", &plan.shares.len().to_string()),
        ("--shares", &shares.join(":")),
        ("--drain-timeout", &drain),
        ("--kv", &values::flag(shape.kv)),
        ("--activations", &values::flag(shape.activations)),
    ]);
    coordinator.extend(tracing(shape));
    coordinator.insert(0, "coordinator".into());
    let mut workers_registry = registry;
    if let Some(reserved) = &plan.registry {
        coordinator.extend(args(&[("--registry-listen", &reserved.address.to_string())]));
        workers_registry = format!("embedded://{}", reserved.address);
    }
    let mut specs = vec![spec("coordinator".to_owned(), coordinator)];
    for rank in 0..plan.shares.len() {
        let id = format!("w{rank}");
        let mut worker: Vec<OsString> = args(&[
            ("--log", log),
            ("--id", &id),
            ("--registry", &workers_registry),
            ("--backend", &values::flag(shape.backend)),
            ("--device", &shape.device.to_string()),
            ("--transport", &values::flag(shape.transport)),
            ("--weights", &values::flag(shape.weights)),
            ("--threads", &plan.threads.to_string()),
            ("--speculate", &shape.speculate.to_string()),
            (
                "--cores",
                &plan.cores.get(rank).map_or(Cores::None, |c| Cores::List(c.clone())).to_string(),
            ),
            ("--drain-timeout", &drain),
        ]);
        worker.extend(tracing(shape));
        worker.insert(0, "worker".into());
        let mut model = OsString::from(format!("{}=", plan.name));
        model.push(&plan.model);
        worker.extend(["--model".into(), model]);
        if let Some(kv) = plan.kv_bytes.get(rank) {
            worker.extend(args(&[("--kv-memory", &kv.to_string())]));
        }
        specs.push(spec(id, worker));
    }
    specs
}

fn tracing(shape: &Shape) -> Vec<OsString> {
    let flags = shape.tracing.flags();
    flags.into_iter().flat_map(|(flag, value)| [flag.into(), value.into()]).collect()
}

fn args(pairs: &[(&str, &str)]) -> Vec<OsString> {
    pairs.iter().flat_map(|(flag, value)| [OsString::from(flag), OsString::from(value)]).collect()
}
