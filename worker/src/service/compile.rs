//! Grammars of requests, compiled on threads of their own with a deadline, before the lead hears of
//! the request.

use std::collections::HashSet;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::sync::{Semaphore, oneshot};

use crate::engine::grammar::{Error, Grammar, Source};
use crate::engine::sequence::Spec;
use crate::session::Held;

/// Requests of one stream whose grammars are compiled or wait for it.
const MAX_WAITING: usize = 256;

/// From a request's coming to its grammar or its refusal.
const DEADLINE: Duration = Duration::from_secs(3);
/// At once. One that is past its deadline goes on until its fuel is spent, and counts until then.
const N_AT_ONCE: usize = 2;
/// Schemas and expressions are taken apart by recursion.
const STACK_BYTES: usize = 64 << 20;

static PLACES: Semaphore = Semaphore::const_new(N_AT_ONCE);

/// Requests of one stream that wait for their grammars.
#[derive(Default)]
pub struct Compiling {
    running: FuturesUnordered<BoxFuture<'static, Compiled>>,
    /// Those of them that were not cancelled.
    wanted: HashSet<u64>,
}

/// A request, and its grammar or why there is none.
pub struct Compiled {
    pub request_id: u64,
    pub spec: Spec,
    pub grammar: Result<Grammar, String>,
}

impl Compiling {
    /// # Errors
    /// Too many wait already, or one of this name.
    pub fn begin(
        &mut self,
        held: Held,
        source: Source,
        request_id: u64,
        spec: Spec,
    ) -> Result<(), String> {
        if self.running.len() >= MAX_WAITING {
            return Err(format!("{MAX_WAITING} grammars of this stream wait already"));
        }
        if !self.wanted.insert(request_id) {
            return Err(format!("request {request_id} waits for its grammar already"));
        }
        let grammar = compile(held, source);
        let compiled = async move { Compiled { request_id, spec, grammar: grammar.await } };
        self.running.push(Box::pin(compiled));
        Ok(())
    }

    /// Whether the request was waiting; it is no longer.
    pub fn cancel(&mut self, request_id: u64) -> bool {
        self.wanted.remove(&request_id)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// The next that is done; none if it was cancelled, or if there are none.
    pub async fn next(&mut self) -> Option<Compiled> {
        let compiled = self.running.next().await?;
        self.wanted.remove(&compiled.request_id).then_some(compiled)
    }
}

/// # Errors
/// Why not, for people.
async fn compile(held: Held, source: Source) -> Result<Grammar, String> {
    let compiled = tokio::time::timeout(DEADLINE, run(held, source)).await;
    let late = format!("the grammar was not compiled within {} s; simplify it", DEADLINE.as_secs());
    compiled.unwrap_or(Err(late))
}

async fn run(held: Held, source: Source) -> Result<Grammar, String> {
    let place = PLACES.acquire().await.map_err(|error| error.to_string())?;
    let (sender, receiver) = oneshot::channel();
    let work = move || {
        let compiled = held.compiler().map_err(Error::clone).and_then(|c| c.compile(&source));
        // Nobody waits for it any more if it was late.
        let _ = sender.send(compiled);
        drop(place);
    };
    let builder = std::thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
    builder.spawn(work).map_err(|error| format!("no thread to compile the grammar: {error}"))?;
    match receiver.await {
        Ok(compiled) => compiled.map_err(|error| error.to_string()),
        // The thread panicked: a defect of the compiler, but only this request's trouble.
        Err(_) => Err("the grammar cannot be compiled".to_owned()),
    }
}
