//! A cluster under test, by `evener up` or as separately started processes.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::etcd::Etcd;
use crate::http::Api;
use crate::ports::Reserved;
use crate::process::{Ended, Process, living_processes_marked, signal};
use crate::{READY, SOON, evener, eventually, model};

/// Which registry a cluster meets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registry {
    Embedded,
    Etcd,
}

/// What cluster is wanted.
#[derive(Debug, Clone)]
pub struct Builder {
    workers: usize,
    shares: Option<String>,
    model: PathBuf,
    registry: Registry,
    separately: bool,
    /// More options of `evener up`, or of each worker.
    args: Vec<String>,
}

/// A running cluster. Dropping it kills all its processes; if the test failed, their output is
/// shown.
pub struct Cluster {
    pub api: Api,
    /// The name the model is served under.
    pub model: String,
    mark: String,
    /// `evener up`, or the coordinator and then the workers by rank.
    processes: Vec<Process>,
    ports: Vec<Reserved>,
    logs: tempfile::TempDir,
    _etcd: Option<Etcd>,
}

impl Cluster {
    /// Two equal workers of one thread with the demo model and the embedded registry, by `evener
    /// up`.
    #[must_use]
    pub fn builder() -> Builder {
        Builder {
            workers: 2,
            shares: None,
            model: model(),
            registry: Registry::Embedded,
            separately: false,
            args: Vec::new(),
        }
    }

    /// Without a trailing slash or `/v1`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.api.url
    }

    /// The worker of a rank, as `GET /status` shows it.
    ///
    /// # Panics
    /// There is none.
    pub async fn worker(&self, rank: usize) -> Value {
        let status = self.api.status().await;
        let workers = status["workers"].as_array().expect("a list of workers");
        let worker = workers.iter().find(|worker| worker["rank"] == rank);
        worker.unwrap_or_else(|| panic!("no worker has rank {rank}: {status:#}")).clone()
    }

    /// Kills the worker of a rank with SIGKILL; answers its process id.
    ///
    /// # Panics
    /// There is none.
    pub async fn kill(&self, rank: usize) -> u64 {
        let pid = self.worker(rank).await["pid"].as_u64().expect("workers tell their process id");
        signal(u32::try_from(pid).expect("a process id"), "KILL");
        pid
    }

    /// Sends SIGTERM to `evener up`, or to the coordinator.
    pub fn terminate(&self) {
        self.processes[0].terminate();
    }

    /// Sends SIGKILL to `evener up`, or to the coordinator.
    pub fn kill_parent(&self) {
        signal(self.processes[0].pid(), "KILL");
    }

    /// Waits for the end of `evener up`, or of the coordinator.
    ///
    /// # Panics
    /// It does not come.
    pub async fn ended(&mut self, deadline: Duration) -> Ended {
        self.processes[0].ended(deadline).await
    }

    /// Waits until none of its processes is left.
    pub async fn until_no_process_is_left(&self) {
        eventually("no process is left", SOON, || async {
            living_processes_marked(&self.mark).is_empty().then_some(())
        })
        .await;
    }
}

impl Builder {
    #[must_use]
    pub fn workers(mut self, n: usize) -> Self {
        self.workers = n;
        self
    }

    /// Also sets the number of workers.
    #[must_use]
    pub fn shares(mut self, shares: &str) -> Self {
        self.workers = shares.split(':').count();
        self.shares = Some(shares.to_owned());
        self
    }

    #[must_use]
    pub fn registry(mut self, registry: Registry) -> Self {
        self.registry = registry;
        self
    }

    /// As an operator would: one coordinator and each worker by a command of its own.
    #[must_use]
    pub fn separately(mut self) -> Self {
        self.separately = true;
        self
    }

    /// An option of `evener up`, or of each worker where they are started separately.
    #[must_use]
    pub fn option(mut self, flag: &str, value: &str) -> Self {
        self.args.extend([flag.to_owned(), value.to_owned()]);
        self
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Panics
    /// It does not get ready.
    pub async fn start(self) -> Cluster {
        let mark = format!("{}-{}", std::process::id(), next_number());
        let etcd = match self.registry {
            Registry::Embedded => None,
            Registry::Etcd => Some(Etcd::start(&mark).await),
        };
        let stem = self.model.file_stem().expect("a model file has a name");
        let model = stem.to_string_lossy().into_owned();
        let logs = tempfile::tempdir().expect("a temporary directory");
        let mut cluster = Cluster {
            api: Api::at(""),
            model,
            mark,
            processes: Vec::new(),
            ports: Vec::new(),
            logs,
            _etcd: etcd,
        };
        if self.separately {
            self.start_separately(&mut cluster);
        } else {
            self.start_up(&mut cluster).await;
        }
        cluster.api.until_ready(READY).await;
        cluster
    }

    fn registry_flag(&self, cluster: &Cluster) -> String {
        match &cluster._etcd {
            Some(etcd) => format!("etcd://{}", etcd.address()),
            None => "embedded".to_owned(),
        }
    }

    async fn start_up(&self, cluster: &mut Cluster) {
        let mut args: Vec<String> = vec!["up".into(), "--model".into()];
        args.push(self.model.display().to_string());
        args.extend(["--workers".into(), self.workers.to_string()]);
        args.extend(["--listen".into(), "127.0.0.1:0".into()]);
        args.extend(["--log-dir".into(), cluster.logs.path().display().to_string()]);
        args.extend(["--registry".into(), self.registry_flag(cluster)]);
        if let Some(shares) = &self.shares {
            args.extend(["--shares".into(), shares.clone()]);
        }
        if !self.args.iter().any(|arg| arg == "--threads") {
            args.extend(["--threads".into(), "1".into()]);
        }
        args.extend(self.args.clone());
        let mut up = Process::start("evener up", &evener(), &args, &cluster.mark);
        let url = |stdout: &str| {
            let url = stdout.split_whitespace().find_map(|word| word.strip_suffix("/v1"));
            url.map(str::to_owned)
        };
        let url = up.prints("the URL of the API", READY, url).await;
        cluster.api = Api::at(&url);
        cluster.processes.push(up);
    }

    fn start_separately(&self, cluster: &mut Cluster) {
        let ports = [Reserved::new(), Reserved::new()];
        let [listen, registry_listen] = ports.each_ref().map(|port| port.address().to_string());
        let registry = self.registry_flag(cluster);
        let workers_registry = match self.registry {
            Registry::Embedded => format!("embedded://{registry_listen}"),
            Registry::Etcd => registry.clone(),
        };
        let mut coordinator = vec!["coordinator", "--listen", &listen, "--registry", &registry];
        coordinator.extend(["--registry-listen", &registry_listen, "--deploy", &cluster.model]);
        let group_size = self.workers.to_string();
        coordinator.extend(["--group-size", &group_size]);
        if let Some(shares) = &self.shares {
            coordinator.extend(["--shares", shares]);
        }
        let mut processes =
            vec![Process::start("coordinator", &evener(), &coordinator, &cluster.mark)];
        let path = self.model.display().to_string();
        for rank in 0..self.workers {
            let id = format!("w{rank}");
            let mut worker = vec!["worker", "--id", &id, "--model", &path, "--threads", "1"];
            worker.extend(["--registry", &workers_registry]);
            worker.extend(self.args.iter().map(String::as_str));
            processes.push(Process::start(&id, &evener(), &worker, &cluster.mark));
        }
        cluster.processes = processes;
        cluster.ports = ports.into();
        cluster.api = Api::at(&format!("http://{listen}"));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for process in &self.processes {
            eprintln!("{}", process.report());
        }
        let runs = std::fs::read_dir(self.logs.path()).into_iter().flatten().flatten();
        let files = runs.filter_map(|run| std::fs::read_dir(run.path()).ok()).flatten().flatten();
        for file in files {
            let text = std::fs::read_to_string(file.path()).unwrap_or_default();
            eprintln!("--- {}\n{text}", file.path().display());
        }
    }
}

fn next_number() -> u32 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
