//! The options of a worker process, each documented once. The command line fills them; nothing else
//! does.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use evener_collective::Transport;
use evener_proto::ids::{ModelName, WorkerId};
use evener_telemetry::Tracer;

use crate::backend;
use crate::checkpoint::Kept;
use crate::engine::speculation::MAX_DRAFTS;
use crate::registration;

/// How a worker runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name in the registry; stable over re-registrations of one process.
    pub worker_id: WorkerId,
    /// Where coordinators reach it (gRPC). Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where the other ranks of its group reach it. Port 0 takes a free one.
    pub collective_listen: SocketAddr,
    /// Host by which others reach both addresses; none: the address listened on.
    pub advertise_host: Option<String>,
    /// What it can serve, and under which names. At least one.
    pub models: Vec<Model>,
    pub backend: backend::Kind,
    /// What becomes of the models' weights when they are loaded. A group's ranks must keep them
    /// alike.
    pub kept: Kept,
    /// Threads of a step, at least 1.
    pub threads: usize,
    pub cores: Cores,
    /// Memory for the KV cache, bytes; none: enough for `max_running` sequences of full context,
    /// but at most a quarter of the available memory, shared by the ranks of this host.
    pub kv_memory_bytes: Option<u64>,
    /// Sequences that run at once when the group does not say.
    pub max_running: usize,
    /// Sequences that wait for their turn; more are refused as overloaded.
    pub max_waiting: usize,
    /// Tokens of one step, over all its sequences.
    pub max_batch_tokens: usize,
    /// While sequences decode, prefill may make a step this many times as long as it would be
    /// without; more than 1.
    pub max_stretch: f64,
    /// Tokens drafted from a sequence's own text and verified with its next one, where that pays;
    /// 0 is off. Counts on the lead.
    pub max_drafts: usize,
    /// Most tokens of one sequence; none: the model's context.
    pub max_context: Option<usize>,
    /// Messages that a stream may leave unread before it is cut off.
    pub max_unread_outputs: usize,
    /// What carries bytes between ranks.
    pub transport: Transport,
    /// Where it registers; none: nowhere, so only who knows its address finds it.
    pub registry: Option<registration::Options>,
    /// How long running sequences may take to finish once shutdown is asked for.
    pub drain_timeout: Duration,
    /// Takes the spans of requests that are traced; off by default.
    pub tracer: Tracer,
}

/// Where a worker's threads run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cores {
    /// On one core each, if this worker is alone in its group on this host and has as many threads
    /// as it may use cores; else anywhere.
    Auto,
    /// Wherever the system puts them.
    Anywhere,
    /// One thread on each of the first; at least as many as threads.
    On(Vec<usize>),
}

/// A model file and the name it is served under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    pub name: ModelName,
    pub path: PathBuf,
}

/// Why options cannot be run with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{option} is {got}; it must be {allowed}")]
    OutOfRange { option: &'static str, got: usize, allowed: &'static str },
    #[error("max_stretch is {got}; it must be more than 1, and at most 1000")]
    Stretch { got: String },
    #[error("no model is given; a worker needs at least one")]
    NoModel,
    #[error("{threads} threads cannot be on {cores} cores; name one core for each")]
    TooFewCores { threads: usize, cores: usize },
    #[error("two models are named `{name}`; give one of them another name")]
    TwoModels { name: ModelName },
}

impl Options {
    /// The defaults, for one worker that listens on free ports of this machine only.
    #[must_use]
    pub fn new(worker_id: WorkerId, models: Vec<Model>) -> Self {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            worker_id,
            listen: loopback,
            collective_listen: loopback,
            advertise_host: None,
            models,
            backend: backend::Kind::Cpu,
            kept: Kept::AsStored,
            threads: 1,
            cores: Cores::Auto,
            kv_memory_bytes: None,
            max_running: 32,
            max_waiting: 256,
            max_batch_tokens: 512,
            max_stretch: 2.0,
            max_drafts: 0,
            max_context: None,
            max_unread_outputs: 1024,
            transport: Transport::Auto,
            registry: None,
            drain_timeout: Duration::from_secs(20),
            tracer: Tracer::default(),
        }
    }

    /// Checks what no type can.
    ///
    /// # Errors
    /// The first option that cannot be.
    pub fn check(&self) -> Result<(), Error> {
        let ranges = [
            ("threads", self.threads, 1..=1024, "from 1 to 1024"),
            ("max_running", self.max_running, 1..=1024, "from 1 to 1024"),
            ("max_waiting", self.max_waiting, 1..=1 << 20, "from 1 to 1048576"),
            ("max_batch_tokens", self.max_batch_tokens, 1..=1 << 16, "from 1 to 65536"),
            ("max_drafts", self.max_drafts, 0..=MAX_DRAFTS, "from 0 to 8"),
            ("max_context", self.max_context.unwrap_or(1), 1..=1 << 24, "from 1 to 16777216"),
            ("max_unread_outputs", self.max_unread_outputs, 1..=1 << 20, "from 1 to 1048576"),
        ];
        for (option, got, range, allowed) in ranges {
            if !range.contains(&got) {
                return Err(Error::OutOfRange { option, got, allowed });
            }
        }
        if !(self.max_stretch > 1.0 && self.max_stretch <= 1000.0) {
            return Err(Error::Stretch { got: self.max_stretch.to_string() });
        }
        if let Cores::On(cores) = &self.cores
            && cores.len() < self.threads
        {
            return Err(Error::TooFewCores { threads: self.threads, cores: cores.len() });
        }
        if self.models.is_empty() {
            return Err(Error::NoModel);
        }
        for (at, model) in self.models.iter().enumerate() {
            if self.models[..at].iter().any(|other| other.name == model.name) {
                return Err(Error::TwoModels { name: model.name.clone() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn impossible_options_are_refused_by_name() {
        let model = |name| Model { name: ModelName::parse(name).unwrap(), path: "x.gguf".into() };
        let check = |change: fn(&mut Options), expect: &str| {
            let mut options = Options::new(WorkerId::parse("w0").unwrap(), vec![model("a")]);
            options.check().unwrap();
            change(&mut options);
            let error = options.check().unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        };
        check(|o| o.threads = 0, "threads is 0");
        check(|o| o.max_batch_tokens = 1 << 17, "max_batch_tokens is 131072");
        check(|o| o.max_stretch = 1.0, "max_stretch is 1");
        check(|o| o.max_drafts = 9, "max_drafts is 9; it must be from 0 to 8");
        check(|o| o.max_stretch = f64::NAN, "max_stretch is NaN");
        check(|o| o.models.clear(), "at least one");
        check(|o| o.cores = Cores::On(Vec::new()), "1 threads cannot be on 0 cores");
        check(|o| o.models.push(o.models[0].clone()), "named `a`");
    }
}
