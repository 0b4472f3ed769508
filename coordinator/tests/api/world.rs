//! An API server with groups whose leads are scripted, and a client for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evener_coordinator::group::figures;
use evener_coordinator::group::handle::{Directory, Model, ReadyGroup};
use evener_coordinator::http::{self, Options};
use evener_proto::ids::{Epoch, GroupId, ModelName};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::lead::{Lead, Rule, Script};
use crate::tiny;

pub const MODEL: &str = "tiny";
pub const CONTEXT: usize = 512;

/// What the tests' leads say: the alphabet, by position, shifted by the seed unless greedy.
pub fn alphabet() -> Rule {
    Arc::new(|tokens, sampling| {
        let seed = if sampling.temperature == 0.0 { 0 } else { sampling.seed };
        let letter = (tokens.len() as u64).wrapping_add(seed) % 26;
        u32::from(b'a') + letter as u32
    })
}

/// Says this text from the position where a prompt of `n_prompt` tokens ends, then stops.
pub fn says(n_prompt: usize, text: &'static [u8]) -> Rule {
    Arc::new(move |tokens, _| {
        text.get(tokens.len() - n_prompt).map_or(tiny::IM_END, |&byte| u32::from(byte))
    })
}

pub fn script(rule: Rule) -> Script {
    Script { rule, stop_token: tiny::IM_END, refusal: None }
}

pub fn options() -> Options {
    let mut options = Options::default();
    options.generation.ready_wait = Duration::from_millis(200);
    options.generation.resume_wait = Duration::from_secs(5);
    options.generation.backoff = Duration::from_millis(5);
    options.drain_timeout = Duration::from_secs(10);
    options
}

pub struct World {
    pub directory: watch::Sender<Arc<Directory>>,
    pub status: watch::Sender<Arc<Value>>,
    pub figures: watch::Sender<Arc<[figures::Group]>>,
    pub url: String,
    pub client: reqwest::Client,
    pub shutdown: CancellationToken,
    pub server: tokio::task::JoinHandle<Result<(), http::ServerError>>,
}

impl World {
    pub async fn start(leads: &[&Lead]) -> Self {
        Self::with(leads, options()).await
    }

    pub async fn with(leads: &[&Lead], options: Options) -> Self {
        let (directory, directory_rx) = watch::channel(Arc::new(directory(leads)));
        let (status, status_rx) = watch::channel(Arc::new(json!({"workers": []})));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shutdown = CancellationToken::new();
        let until = shutdown.clone().cancelled_owned();
        let (figures, figures_rx) = watch::channel(Arc::from([]));
        let view = http::View { directory: directory_rx, status: status_rx, figures: figures_rx };
        let server = tokio::spawn(http::run(listener, view, options, until));
        let client = reqwest::Client::new();
        Self { directory, status, figures, url, client, shutdown, server }
    }

    pub fn set_leads(&self, leads: &[&Lead]) {
        self.directory.send_replace(Arc::new(directory(leads)));
    }

    pub async fn get(&self, path: &str) -> Answer {
        let url = format!("{}{path}", self.url);
        Answer::read(self.client.get(url).send().await.unwrap()).await
    }

    /// Sends a body; the model is added where it is missing.
    pub async fn post(&self, path: &str, body: Value) -> Answer {
        Answer::read(self.open(path, body).await).await
    }

    /// Sends a body and leaves the answer to be read.
    pub async fn open(&self, path: &str, mut body: Value) -> reqwest::Response {
        if let Value::Object(map) = &mut body {
            map.entry("model").or_insert(json!(MODEL));
        }
        self.client.post(format!("{}{path}", self.url)).json(&body).send().await.unwrap()
    }

    pub async fn post_bytes(&self, path: &str, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.client.post(format!("{}{path}", self.url)).body(body);
        Answer::read(request.send().await.unwrap()).await
    }

    /// Value of a metric, exactly as it is written before its value.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").await.text;
        let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
        line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
    }

    pub async fn until_metric(&self, name: &str, expect: f64) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let got = self.metric(name).await;
            if got == expect {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is {got}, never became {expect}");
        }
    }
}

pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Answer {
    async fn read(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, text: response.text().await.unwrap() }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e} in {}", self.text))
    }

    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    /// The events of a stream that ended well, without `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        let body = self.text.strip_suffix("data: [DONE]\n\n").expect("a stream ends with [DONE]");
        events(body)
    }
}

pub fn events(body: &str) -> Vec<Value> {
    let data = body.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
    data.map(|json| serde_json::from_str(json).unwrap()).collect()
}

pub fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

pub fn model() -> Model {
    Model {
        name: ModelName::parse(MODEL).unwrap(),
        architecture: "llama".to_owned(),
        quantization: "Q4_1".to_owned(),
        licence: "apache-2.0".to_owned(),
        tokenizer_json: tiny::tokenizer_json(),
        chat_template: Some(tiny::TEMPLATE.to_owned()),
        bos_token_id: Some(tiny::END_OF_TEXT),
        add_bos_token: false,
        bos_token: "<|endoftext|>".to_owned(),
        eos_token: "<|im_end|>".to_owned(),
        eos_token_ids: vec![tiny::IM_END],
        context_length: CONTEXT as u32,
        vocab_size: tiny::VOCAB_SIZE,
        n_parameters: 1000,
        weight_bytes: 1000,
        fingerprint: "00ff00ff00ff00ff".to_owned(),
        created_unix_s: 1_700_000_000,
    }
}

pub fn directory(leads: &[&Lead]) -> Directory {
    let groups = leads.iter().map(|lead| Arc::new(group(lead))).collect::<Vec<_>>();
    let missing = if groups.is_empty() {
        vec!["model tiny wants 2 workers, 0 hold it".to_owned()]
    } else {
        Vec::new()
    };
    let model = Arc::new(model());
    Directory { models: [(model.name.clone(), model)].into(), groups, missing }
}

fn group(lead: &Lead) -> ReadyGroup {
    ReadyGroup {
        id: GroupId::parse(&lead.group).unwrap(),
        epoch: Epoch::parse(lead.epoch).unwrap(),
        model: ModelName::parse(MODEL).unwrap(),
        lead_address: lead.address.to_string(),
        world_size: 2,
        kv_blocks: 32,
        kv_block_len: 16,
        deterministic: true,
    }
}
