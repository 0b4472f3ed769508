//! A traced request, as an OpenTelemetry collector gets it from all processes of a cluster.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use evener_tests::{Cluster, READY, SOON, eventually};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::json;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const TRACE: u128 = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c;
const CLIENT: u64 = 0xb7ad_6b71_6920_3331;
const CANARY: &str = "zephyrquokka";
const MAX_TOKENS: u64 = 24;

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// A span and the process that it came from.
#[derive(Debug, Clone)]
struct Told {
    service: String,
    instance: String,
    span: Span,
}

impl Collector {
    async fn start() -> (String, Self) {
        let collector = Self::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("it has an address"));
        let service = TraceServiceServer::new(collector.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (endpoint, collector)
    }

    fn spans(&self) -> Vec<Told> {
        let mut told = Vec::new();
        for batch in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for of_process in &batch.resource_spans {
                let resource = of_process.resource.as_ref().expect("a process says who it is");
                let about = |key| match attribute(&resource.attributes, key) {
                    Some(Any::StringValue(text)) => text,
                    other => panic!("{key} is {other:?}"),
                };
                let (service, instance) = (about("service.name"), about("service.instance.id"));
                let spans = of_process.scope_spans.iter().flat_map(|scope| &scope.spans);
                told.extend(spans.map(|span| Told {
                    service: service.clone(),
                    instance: instance.clone(),
                    span: span.clone(),
                }));
            }
        }
        told
    }
}

fn attribute(
    attributes: &[opentelemetry_proto::tonic::common::v1::KeyValue],
    key: &str,
) -> Option<Any> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    found.value.clone()?.value
}

fn number(span: &Span, key: &str) -> u64 {
    match attribute(&span.attributes, key) {
        Some(Any::IntValue(n)) => u64::try_from(n).expect("no attribute is negative"),
        other => panic!("{key} of {} is {other:?}", span.name),
    }
}

fn micros(span: &Span) -> u64 {
    (span.end_time_unix_nano - span.start_time_unix_nano) / 1000
}

async fn ask(cluster: &Cluster, traceparent: Option<String>) -> String {
    let client = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
    let body = json!({
        "model": cluster.model,
        "messages": [{"role": "user", "content": format!("Tell me of the {CANARY}.")}],
        "max_tokens": MAX_TOKENS,
        "min_tokens": MAX_TOKENS,
        "temperature": 0,
    });
    let mut request = client.post(format!("{}/v1/chat/completions", cluster.url())).json(&body);
    if let Some(traceparent) = traceparent {
        request = request.header("traceparent", traceparent);
    }
    let answer = request.timeout(SOON).send().await.expect("an answer");
    assert_eq!(answer.status(), 200);
    let answer: serde_json::Value = answer.json().await.expect("it is JSON");
    answer["choices"][0]["message"]["content"].as_str().expect("it has text").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sampled_request_is_one_tree_of_spans_over_all_processes() {
    let (endpoint, collector) = Collector::start().await;
    let cluster = Cluster::builder()
        .option("--otlp-endpoint", &endpoint)
        .option("--trace-sample", "0")
        .start()
        .await;
    ask(&cluster, None).await;
    let answer = ask(&cluster, Some(format!("00-{TRACE:032x}-{CLIENT:016x}-01"))).await;
    let told = eventually("the whole tree has arrived", READY, || async {
        let told = collector.spans();
        let has = |name: &str| told.iter().any(|told| told.span.name == name);
        let n_steps = |instance: &str| {
            let steps = told.iter().filter(|told| told.span.name == "step");
            steps.filter(|told| told.instance == instance).count()
        };
        let is_whole = ["POST /v1/chat/completions", "generate", "queue", "prefill", "decode"]
            .into_iter()
            .all(has)
            && n_steps("w0") > 16
            && n_steps("w0") == n_steps("w1");
        is_whole.then_some(told)
    })
    .await;

    assert!(told.iter().all(|told| told.span.trace_id == TRACE.to_be_bytes()), "only the sampled");
    let ids: BTreeSet<&[u8]> = told.iter().map(|told| told.span.span_id.as_slice()).collect();
    assert_eq!(ids.len(), told.len(), "no two spans have one id");
    let one = |name: &str| {
        let mut all = told.iter().filter(|told| told.span.name == name);
        let one = all.next().unwrap_or_else(|| panic!("no {name}"));
        assert!(all.next().is_none(), "two of {name}");
        one
    };
    let request = one("POST /v1/chat/completions");
    assert_eq!(request.service, "evener-coordinator");
    assert_eq!(request.span.parent_span_id, CLIENT.to_be_bytes());
    assert_eq!(number(&request.span, "http.response.status_code"), 200);
    assert_eq!(number(&request.span, "gen_ai.usage.output_tokens"), MAX_TOKENS);
    let generate = one("generate");
    assert_eq!(generate.span.parent_span_id, request.span.span_id);
    let phases = ["queue", "prefill", "decode"].map(one);
    for phase in phases {
        assert_eq!((phase.service.as_str(), phase.instance.as_str()), ("evener-worker", "w0"));
        assert_eq!(phase.span.parent_span_id, generate.span.span_id);
    }
    let at_lead: u64 = phases.iter().map(|phase| micros(&phase.span)).sum();
    let whole = micros(&generate.span);
    // Clocks are read one after the other: some microseconds may lie between.
    assert!(at_lead <= whole + 1000, "phases of {at_lead} us in {whole} us");
    assert!(at_lead >= whole / 2, "phases of {at_lead} us in {whole} us");
    check_steps(&told, phases);
    let sent = format!("{told:?}");
    assert!(!sent.contains(CANARY), "a prompt is in the spans");
    assert!(answer.trim().len() > 8 && !sent.contains(answer.trim()), "an answer is in the spans");
}

/// Steps of both ranks, below the phases, each the sum of its parts.
fn check_steps(told: &[Told], phases: [&Told; 3]) {
    let [_, prefill, decode] = phases;
    for (rank, instance) in [(0, "w0"), (1, "w1")] {
        let steps: Vec<&Span> = told
            .iter()
            .filter(|told| told.span.name == "step" && told.instance == instance)
            .map(|told| &told.span)
            .collect();
        let numbers: BTreeSet<u64> = steps.iter().map(|s| number(s, "evener.step")).collect();
        assert_eq!(numbers.len(), steps.len(), "each step once");
        for step in steps {
            assert_eq!(number(step, "evener.rank"), rank);
            let parent =
                [prefill, decode].into_iter().find(|p| p.span.span_id == step.parent_span_id);
            let parent = parent.expect("a step belongs to a phase");
            let [compute, wait, transfer] = ["compute", "wait", "transfer"]
                .map(|part| number(step, &format!("evener.{part}_us")));
            let sum = compute + wait + transfer;
            // Each is rounded down.
            assert!(sum.abs_diff(micros(step)) <= 4, "{sum} us of {} us", micros(step));
            // The follower ends a step a little after the lead, by clocks of one machine.
            assert!(step.end_time_unix_nano <= parent.span.end_time_unix_nano + 50_000_000);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_fails_nothing() {
    let cluster = Cluster::builder()
        .option("--otlp-endpoint", "http://127.0.0.1:9")
        .option("--trace-sample", "1")
        .start()
        .await;
    ask(&cluster, None).await;
    let client = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
    eventually("spans that found no collector are counted", SOON, || async {
        let response = client.get(format!("{}/metrics", cluster.url())).send().await.ok()?;
        let text = response.text().await.ok()?;
        let failed = text
            .lines()
            .find_map(|line| line.strip_prefix("evener_spans_total{result=\"failed\"} "));
        (failed?.parse::<u64>().ok()? > 0).then_some(())
    })
    .await;
    ask(&cluster, None).await;
}
