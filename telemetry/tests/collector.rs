//! A collector that takes, refuses or is not there, and what becomes of the spans.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant, SystemTime};

use evener_telemetry::{Context, Finished, Kind, Options, Tracer};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const DEADLINE: Duration = Duration::from_secs(20);

struct Collector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let sent = self.0.send(request.into_inner());
        sent.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn collector() -> (String, mpsc::UnboundedReceiver<ExportTraceServiceRequest>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let service = TraceServiceServer::new(Collector(sender));
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (endpoint, receiver)
}

fn options(endpoint: &str) -> Options {
    let options = Options::to(endpoint.to_owned(), "evener-test", "i".to_owned());
    Options { ratio: 1.0, interval: Duration::from_millis(50), ..options }
}

async fn spans(
    received: &mut mpsc::UnboundedReceiver<ExportTraceServiceRequest>,
    n: usize,
) -> Vec<Span> {
    let mut spans = Vec::new();
    while spans.len() < n {
        let batch = tokio::time::timeout(DEADLINE, received.recv()).await.unwrap().unwrap();
        for of_resource in batch.resource_spans {
            let about = of_resource.resource.unwrap().attributes;
            assert!(about.iter().any(|attribute| attribute.key == "service.name"), "{about:?}");
            spans.extend(of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
    }
    spans
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_spans_with_ids_parents_and_times() {
    let (endpoint, mut received) = collector().await;
    let tracer = Tracer::start(options(&endpoint)).unwrap();
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let request = tracer.request("ask", Some(parent)).unwrap();
    let child = request.child("part", Kind::Client);
    child.set("n", 7u64);
    child.fail();
    drop(child);
    drop(request);
    let spans = spans(&mut received, 2).await;
    let [part, ask] = ["part", "ask"].map(|name| spans.iter().find(|s| s.name == name).unwrap());
    assert_eq!(ask.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes());
    assert_eq!(ask.parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
    assert_eq!((&part.trace_id, &part.parent_span_id), (&ask.trace_id, &ask.span_id));
    assert!(ask.start_time_unix_nano <= part.start_time_unix_nano);
    assert!(part.end_time_unix_nano <= ask.end_time_unix_nano);
    assert_eq!(part.attributes[0].key, "n");
    assert_eq!(part.status.as_ref().unwrap().code, 2);
    let deadline = Instant::now() + DEADLINE;
    while tracer.counts().unwrap().exported < 2 {
        assert!(Instant::now() < deadline, "{:?}", tracer.counts());
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_sampled_by_their_sender_or_the_ratio() {
    let (endpoint, _received) = collector().await;
    let none = Tracer::start(Options { ratio: 0.0, ..options(&endpoint) }).unwrap();
    let all = Tracer::start(options(&endpoint)).unwrap();
    let [yes, no] = ["01", "00"]
        .map(|flags| format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}"));
    for (tracer, traceparent, expect) in [
        (&none, None, false),
        (&none, Some("nonsense"), false),
        (&none, Some(yes.as_str()), true),
        (&all, None, true),
        (&all, Some("nonsense"), true),
        (&all, Some(no.as_str()), false),
        (&Tracer::default(), Some(yes.as_str()), false),
    ] {
        assert_eq!(tracer.request("ask", traceparent).is_some(), expect, "{traceparent:?}");
    }
    let half = Tracer::start(Options { ratio: 0.5, ..options(&endpoint) }).unwrap();
    let n_sampled = (0..1000).filter(|_| half.request("ask", None).is_some()).count();
    assert!((350..650).contains(&n_sampled), "{n_sampled} of 1000");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_costs_spans_and_no_time() {
    const N: u64 = 20_000;
    // Nobody listens there, and nobody may.
    let endpoint = "http://127.0.0.1:9";
    let tracer = Tracer::start(options(endpoint)).unwrap();
    let (context, now) = (Context::root(), SystemTime::now());
    let finished = || Finished {
        name: "step",
        context: context.child(),
        parent: Some(context),
        kind: Kind::Internal,
        start: now,
        end: now,
        failed: false,
        attributes: Vec::new(),
    };
    let began = Instant::now();
    (0..N).for_each(|_| tracer.record(finished()));
    let each = began.elapsed() / N as u32;
    assert!(each < Duration::from_micros(200), "{each:?} a span");
    let deadline = Instant::now() + DEADLINE;
    while tracer.counts().unwrap().failed == 0 {
        assert!(Instant::now() < deadline, "{:?}", tracer.counts());
        tokio::task::yield_now().await;
    }
    let counts = tracer.counts().unwrap();
    assert_eq!((counts.recorded, counts.exported), (N, 0));
    let ended = tokio::task::spawn_blocking(move || {
        let began = Instant::now();
        tracer.shut_down(Duration::from_secs(1));
        began.elapsed()
    });
    assert!(ended.await.unwrap() < DEADLINE);
}

#[tokio::test]
async fn what_cannot_be_is_refused() {
    for endpoint in ["", "http://", "https://a:4317", "a:4317"] {
        assert!(Tracer::start(options(endpoint)).is_err(), "{endpoint}");
    }
    for ratio in [-0.1, 1.1, f64::NAN] {
        let options = Options { ratio, ..options("http://127.0.0.1:9") };
        assert!(Tracer::start(options).is_err(), "{ratio}");
    }
}
