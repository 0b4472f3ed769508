//! A span under way. It is recorded when the last of its clones goes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use opentelemetry::trace::{SpanKind, Status};

use super::{Context, Finished, Tracer};

/// Where a span stands between processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Answers a request from outside.
    Server,
    /// Asks another process and waits for it.
    Client,
    Internal,
}

/// Of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub struct Value(pub(crate) opentelemetry::Value);

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Span(Arc<Live>);

#[derive(Debug)]
struct Live {
    tracer: Tracer,
    name: &'static str,
    context: Context,
    parent: Option<Context>,
    kind: Kind,
    start: SystemTime,
    said: Mutex<Said>,
}

#[derive(Debug, Default)]
struct Said {
    failed: bool,
    attributes: Vec<(&'static str, Value)>,
}

impl Span {
    pub(crate) fn begin(
        tracer: Tracer,
        name: &'static str,
        context: Context,
        parent: Option<Context>,
        kind: Kind,
    ) -> Self {
        let (start, said) = (SystemTime::now(), Mutex::default());
        Self(Arc::new(Live { tracer, name, context, parent, kind, start, said }))
    }

    /// Begins a part of it.
    #[must_use]
    pub fn child(&self, name: &'static str, kind: Kind) -> Self {
        let Live { tracer, context, .. } = &*self.0;
        Self::begin(tracer.clone(), name, context.child(), Some(*context), kind)
    }

    #[must_use]
    pub fn context(&self) -> Context {
        self.0.context
    }

    pub fn set(&self, key: &'static str, value: impl Into<Value>) {
        self.0.said().attributes.push((key, value.into()));
    }

    pub fn fail(&self) {
        self.0.said().failed = true;
    }
}

impl Live {
    fn said(&self) -> std::sync::MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let Said { failed, attributes } = std::mem::take(&mut *self.said());
        self.tracer.record(Finished {
            name: self.name,
            context: self.context,
            parent: self.parent,
            kind: self.kind,
            start: self.start,
            end: SystemTime::now(),
            failed,
            attributes,
        });
    }
}

impl Kind {
    pub(crate) fn to_sdk(self) -> SpanKind {
        match self {
            Self::Server => SpanKind::Server,
            Self::Client => SpanKind::Client,
            Self::Internal => SpanKind::Internal,
        }
    }
}

pub(crate) fn status(failed: bool) -> Status {
    if failed { Status::error("") } else { Status::Unset }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self(value.into())
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self(i64::try_from(value).unwrap_or(i64::MAX).into())
    }
}

impl From<&'static str> for Value {
    fn from(value: &'static str) -> Self {
        Self(value.into())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self(value.into())
    }
}
